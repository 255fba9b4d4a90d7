"""The engine: checkpoints merged unit by unit as they stream through memory, or over a mesh."""
