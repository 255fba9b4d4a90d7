"""Jobs: a recipe in, a finished folder out."""
