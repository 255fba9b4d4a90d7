"""Adapters to other software; each module needs what it adapts to, and is imported by name."""
