"""Run jobs: each turns a recipe or settings into a finished folder."""
