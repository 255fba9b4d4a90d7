"""Representations: pooled hidden states, and the typical samples among them."""
