"""Batching: encodes prompts, opens pictures (or reads their cached features) and packs groups into token rows (forests)."""
