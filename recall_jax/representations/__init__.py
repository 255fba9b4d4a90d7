"""Extract pooled hidden states, and choose the typical samples among them."""
