"""Merge JAX parameter trees, in memory and on disk."""
