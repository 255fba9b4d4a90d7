"""Trees: JAX parameter trees, in memory and on disk, merged like checkpoints."""
