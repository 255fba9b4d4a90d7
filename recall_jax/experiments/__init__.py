"""Experiments: jobs arranged in graphs, and the demo."""
