"""Audit of a set of groups: shortcuts by which a model could tell true from false without looking,
duplicates, and overlap with benchmarks.
"""
