"""Suites of models that anyone can make from a seed: what continual learning is tried on."""
