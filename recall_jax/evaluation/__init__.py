"""Evaluate models on tasks, by their answers or by likelihoods."""
