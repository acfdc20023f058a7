"""Batching: encodes prompts, opens pictures, and packs groups into token rows (forests)."""
