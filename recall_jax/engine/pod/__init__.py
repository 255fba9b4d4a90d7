"""Merge in many processes at once: tensors sharded over a mesh, its programs, and its writers."""
