"""Memory, FLOPs, throughput and cost of a run. Not built yet."""
