"""Integrate with other software; each module must be imported by name, and needs that software."""
