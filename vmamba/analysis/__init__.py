"""FLOPs, throughput, memory and pictures."""
