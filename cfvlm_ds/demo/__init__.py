"""Built-in data and models for demos and tests: the world with habits, its pretrained base model, and small random checkpoints."""
