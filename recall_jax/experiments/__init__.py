"""Run experiments, which combine many jobs, and the demo."""
