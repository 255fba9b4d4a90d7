"""Predict from shapes what a merge will cost on a machine, without running on it."""
