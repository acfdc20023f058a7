"""A training run: checks, resume, optimizer steps, evaluation and export."""
