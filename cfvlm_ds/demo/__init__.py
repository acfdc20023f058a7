"""The embedded world of scenes and small random checkpoints: everything can be trained and tested without a download."""
