"""Vary RECALL's choices one at a time, and analyse the units of the models."""
