"""Representations: texts to tokens to pooled hidden states, and the typical samples among them."""
