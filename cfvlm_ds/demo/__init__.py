"""Demo data and models: the embedded world with habits and small random checkpoints, for training and tests without a download."""
