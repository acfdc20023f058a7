"""Batching: encodes prompts, opens pictures or reads their cached features, and packs groups into rows of tokens as a forest."""
