"""What a merge will cost on a machine that need not be at hand; pure, computed from shapes."""
