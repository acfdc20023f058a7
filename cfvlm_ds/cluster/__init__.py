"""Cluster support of a run: signals, the end of the job's time, hanging ranks, the lock of the run folder, broken nodes."""
