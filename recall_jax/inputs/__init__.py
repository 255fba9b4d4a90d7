"""Read files of rows, and turn them into batches of tokens."""
