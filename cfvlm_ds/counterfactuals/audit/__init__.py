"""Audit of a data set for duplicates, overlap with benchmarks, and shortcuts by which true and false texts can be told apart without the
picture.
"""
