"""Benchmark suite: items are checked, scored unless their scores are on disk, and the results are written, shown and compared."""
