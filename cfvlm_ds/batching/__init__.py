"""Batching of groups into rows of tokens: encodes prompts, opens images or reads their cached features, and packs texts after them as a
forest.
"""
