"""What a model can do: generation, likelihoods, and the scores of its answers."""
