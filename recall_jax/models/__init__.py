"""Models: Flax forwards, unit by unit, and the tables that map checkpoint names to them."""
