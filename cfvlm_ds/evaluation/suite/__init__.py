"""Benchmark suite: checks items, scores those without scores on disk, and writes, shows and compares results."""
