"""What a model can do: greedy decoding, and the share of its answers that are right."""
