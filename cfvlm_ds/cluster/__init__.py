"""Cluster support for a run: signals, the job's time limit, hanging ranks, the lock of the run folder, and broken nodes."""
