"""Engines: the same arithmetic over trees in memory, or streamed unit by unit from disk."""
