"""Implement merge methods: their parameters, kernels, and what they need to run."""
