"""Built-in data and models for demos and tests, with no download: the world with habits, its pretrained base model, and small random
checkpoints.
"""
