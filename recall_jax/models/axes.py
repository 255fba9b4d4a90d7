"""Name the logical axis of each dimension of a parameter; every sharding derives from them.

The axes are those of the Flax parameters, (in, out): `embed` the hidden size, `heads` the attention
heads times their width, `mlp` the intermediate size, `vocab` the vocabulary, `layers` the stacked
blocks. None is a dimension that is never sharded.
"""

from collections.abc import Mapping, Sequence

from recall_jax.models.architecture import LAYERS
from recall_jax.models.convert import flax_path

Axes = tuple[str | None, ...]

VOCAB, HEADS, MLP, HIDDEN = "vocab", "heads", "mlp", "embed"

# The axes of a matrix (in, out), by the name of its module.
_KERNELS: Mapping[str, tuple[str, str]] = {
    "q_proj": (HIDDEN, HEADS),
    "k_proj": (HIDDEN, HEADS),
    "v_proj": (HIDDEN, HEADS),
    "o_proj": (HEADS, HIDDEN),
    "gate_proj": (HIDDEN, MLP),
    "up_proj": (HIDDEN, MLP),
    "down_proj": (MLP, HIDDEN),
    "lm_head": (HIDDEN, VOCAB),
}
_HEAD_NORMS = ("q_norm", "k_norm")


def logical_axes(path: Sequence[str]) -> Axes | None:
    """Return the axes of a Flax parameter; None if the path is not that of a parameter.

    An example of a path is ("layers", "mlp", "up_proj", "kernel"); it may have a prefix, as the
    paths of an optimizer's moments do. LoRA's factors `a` (in, r) and `b` (r, out) are sharded
    like their layer.
    """
    stacked: Axes = (LAYERS,) if LAYERS in path else ()
    if not path:
        return None
    module, leaf = path[-2] if len(path) > 1 else "", path[-1]
    if leaf == "embedding":
        return (VOCAB, HIDDEN)
    if leaf == "scale":
        return (*stacked, None if module in _HEAD_NORMS else HIDDEN)
    if module not in _KERNELS:
        return None
    inputs, outputs = _KERNELS[module]
    by_leaf: Mapping[str, Axes] = {
        "kernel": (inputs, outputs),
        "bias": (outputs,),
        "a": (inputs, None),
        "b": (None, outputs),
    }
    return (*stacked, *by_leaf[leaf]) if leaf in by_leaf else None


def tensor_axes(family: str, name: str) -> Axes:
    """Return the axes of one layer's tensor on disk, (out, in), by its Hugging Face name."""
    path = flax_path(family, name)
    axes = logical_axes(path.split("/"))
    assert axes is not None, name
    return axes[::-1] if path.endswith("kernel") else axes
