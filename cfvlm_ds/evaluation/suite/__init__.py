"""Benchmark suite: checks items, scores the items that have no scores on disk, and writes, shows and compares results."""
