"""Inputs: files of rows, and tokenizers that make batches of them."""
