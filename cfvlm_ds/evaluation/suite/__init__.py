"""Benchmarks that a model is asked: items checked, scored where nothing of them is on disk yet, results kept, shown and compared."""
