"""Audit of a set of groups: duplicates, overlap with benchmarks, and shortcuts that tell true from false texts without the picture."""
