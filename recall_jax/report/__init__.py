"""What was merged, and why each layer was weighed as it was: JSON, HTML and model card."""
