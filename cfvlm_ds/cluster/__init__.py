"""What a run shares a cluster with: signals, the time of its job, ranks that hang, other runs in its folder, broken nodes."""
