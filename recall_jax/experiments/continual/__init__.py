"""Continual learning: tasks learnt one after the other by several strategies, and what is left."""
