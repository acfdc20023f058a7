"""Audit of a data set for duplicates, overlap with benchmarks, and shortcuts that separate true from false texts without the picture."""
