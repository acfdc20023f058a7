"""Demo data and models: the embedded world of scenes and small random checkpoints, for training and tests without a download."""
