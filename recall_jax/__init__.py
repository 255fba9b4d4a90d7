"""Merge fine-tuned checkpoints without losing what each has learnt: RECALL in JAX."""
