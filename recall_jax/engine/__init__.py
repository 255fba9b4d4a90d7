"""Merge checkpoints unit by unit, as they stream through memory on one host or over a mesh."""
