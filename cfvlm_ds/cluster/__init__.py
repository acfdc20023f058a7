"""Cluster support: signals, a job's time limit, hang detection, the lock of the run folder, and node checks."""
