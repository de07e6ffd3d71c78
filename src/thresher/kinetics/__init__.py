"""What test-time scaling costs when memory counts: the law, traces, frontiers, a planner and experiments (Kinetics)."""
