"""Run continual learning: learn tasks in sequence by several strategies, and measure retention."""
