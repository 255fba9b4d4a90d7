"""Distinguish names of trees from those of models' folders, with few imports."""

from pathlib import Path

from recall_jax.checkpoint.folder_files import WEIGHTS


def names_tree(name: str) -> bool:
    """Return whether a name is that of a tree on disk, and not of a model's folder."""
    path = Path(name)
    if not path.exists() or any((path / weights).exists() for weights in WEIGHTS):
        return False
    from recall_jax.jobs.trees.files import is_tree

    return is_tree(name)
