"""Checkpoints: bytes on disk to named arrays and back."""
