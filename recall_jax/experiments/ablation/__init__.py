"""Ablations: each of RECALL's choices varied alone, and what the units of the models tell."""
