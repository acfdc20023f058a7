"""Batching: groups become rows of tokens. Prompts are encoded, images opened or read from the feature cache, and texts packed after them as
a forest.
"""
