"""Read and write checkpoints: bytes on disk as named arrays."""
