"""Batching of groups into rows of tokens. Prompts are encoded, images are opened or read from the feature cache, and texts are packed after
them as a forest.
"""
