"""Recipes: the YAML of a merge, and the patterns that name the leaves of a tree."""
