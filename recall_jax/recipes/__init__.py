"""Read recipes: the YAML of a merge, and patterns that name the leaves of a tree."""
