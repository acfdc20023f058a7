"""Demo data and models for training and tests without a download: the world with habits, its pretrained base model, and small random
checkpoints.
"""
