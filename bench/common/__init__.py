"""What the benchmarks share: directions, data, other methods' scores, and figures over seeds."""
