"""The embedded world of scenes and small random checkpoints, with which everything can be trained and tested without a download."""
