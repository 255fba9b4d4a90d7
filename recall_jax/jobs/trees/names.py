"""What a user names: a tree, or a model's folder; told without what reading trees takes to load."""

from pathlib import Path

from recall_jax.checkpoint.folder_files import WEIGHTS


def names_tree(name: str) -> bool:
    """Whether there is a tree on disk by this name; what is plainly a model's folder is none."""
    path = Path(name)
    if not path.exists() or any((path / weights).exists() for weights in WEIGHTS):
        return False
    from recall_jax.jobs.trees.files import is_tree

    return is_tree(name)
