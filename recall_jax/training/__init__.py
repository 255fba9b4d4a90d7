"""Fine-tuning: examples to batches, batches to gradients, gradients to a model, resumable."""
