"""Merge fine-tuned checkpoints without losing what each has learnt: RECALL in JAX.

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "InputError": "recall_jax.errors",
    "extract": "recall_jax.representations.extract",
    "rbf_similarity": "recall_jax.similarity.compare",
    "layer_weights": "recall_jax.methods.weights",
    "merge_trees": "recall_jax.jobs.trees.merge_trees",
    "unit_of_path": "recall_jax.jobs.trees.merge_trees",
    "recall_merge": "recall_jax.jobs.trees.recall_merge",
}

__all__ = [
    "InputError",
    "extract",
    "layer_weights",
    "merge_trees",
    "rbf_similarity",
    "recall_merge",
    "unit_of_path",
]

if TYPE_CHECKING:
    from recall_jax.errors import InputError
    from recall_jax.jobs.trees.merge_trees import merge_trees, unit_of_path
    from recall_jax.jobs.trees.recall_merge import recall_merge
    from recall_jax.methods.weights import layer_weights
    from recall_jax.representations.extract import extract
    from recall_jax.similarity.compare import rbf_similarity


def __getattr__(name: str) -> Any:
    """Import a public name's module, or a room of the package, on first use."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'recall_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*globals(), *__all__])
