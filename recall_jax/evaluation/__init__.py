"""What a model can do: tasks, its answers and their likelihoods, and the scores of these."""
