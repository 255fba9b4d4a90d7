"""Merge a tree leaf by leaf, with a method's kernel on each leaf, or on each layer it stacks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import methodcaller
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.engine.device import all_finite, not_finite_message, overflow_message
from recall_jax.engine.kernel import Kernel
from recall_jax.engine.sources import Inputs
from recall_jax.errors import InputError
from recall_jax.jobs.trees.files import Leaf, TreeFile, leaf_sharding, read_leaves
from recall_jax.jobs.trees.places import Place
from recall_jax.parallel.turns import in_turn

GROUP_BYTES = 1 << 28  # bytes of a model's leaves that are read at a time


def merge_leaves(
    trees: Inputs[TreeFile],
    places: Mapping[str, Place],
    values: Mapping[str, Mapping[str, Any]],
    *,
    kernel: Kernel,
    reference: int = -1,
    needs_full: Callable[[str], bool] = lambda name: False,
    dtype: np.dtype[Any] | None = None,
    mesh: Mesh | None = None,
    report: Callable[[str, int], None] = lambda name, done: None,
) -> Iterator[tuple[str, Leaf]]:
    """Yield the leaves of the merged tree, in the order of the newest (last) model's.

    `values` are the kernel's values for each slice, by its name. Leaves without a place are copied
    from the newest model. The kernel computes in float32 and rounds once to `dtype`, or to the
    newest model's dtype. On a mesh, each leaf is sharded over the devices. The layers of a stacked
    leaf are merged one after the other if `needs_full(name)` of its slices, which says that the
    kernel must receive a full tensor; otherwise they are vectorised. `report(name, done)` is called
    before each leaf. Raises InputError, which names leaf and model, if a parameter is not finite.
    """
    newest = trees.newest
    done = 0
    for group in groups(newest.specs, GROUP_BYTES):
        shardings = shardings_of({name: newest.specs[name] for name in group}, places, mesh)
        leaves = _read(trees, group, places, shardings)
        for name in group:
            report(name, done)
            done += 1
            if name not in places:
                yield name, leaves.newest.pop(name)
                continue
            stored = leaves.map(methodcaller("pop", name))
            out = newest.specs[name].dtype if dtype is None else dtype
            # JAX has float64 only under x64.
            with jax.enable_x64(
                8 in {out.itemsize, *(leaf.dtype.itemsize for leaf in stored.models)}
            ):
                leaf, finite = _merge(
                    stored.models,
                    _values(values, name, places[name]),
                    stored.base,
                    kernel,
                    reference,
                    out,
                    places[name].axis,
                    any(map(needs_full, places[name].slice_names(name))),
                    shardings.get(name),
                )
            if not finite:
                raise InputError(_fault(name, trees, stored, out))
            yield name, leaf if name in shardings else np.asarray(leaf)


def _read(
    trees: Inputs[TreeFile],
    group: Sequence[str],
    places: Mapping[str, Place],
    shardings: Mapping[str, Sharding],
) -> Inputs[dict[str, Leaf]]:
    """Read the leaves of a group: all of the newest tree, and of the others those with a place."""
    shared, newest = [name for name in group if name in places], trees.newest
    return trees.map(lambda tree: read_leaves(tree, group if tree is newest else shared, shardings))


def groups(specs: Mapping[str, TensorSpec], most: int) -> Iterator[list[str]]:
    """Yield groups of consecutive leaves with at most `most` bytes, or a single leaf."""
    group: list[str] = []
    size = 0
    for name, spec in specs.items():
        if group and size + spec.nbytes > most:
            yield group
            group, size = [], 0
        group.append(name)
        size += spec.nbytes
    yield group


def shardings_of(
    specs: Mapping[str, TensorSpec], places: Mapping[str, Place], mesh: Mesh | None
) -> dict[str, Sharding]:
    """Return the sharding of each leaf that has one."""
    found = {
        name: leaf_sharding(spec, mesh, places[name].axis if name in places else None)
        for name, spec in specs.items()
    }
    return {name: sharding for name, sharding in found.items() if sharding is not None}


def _values(
    values: Mapping[str, Mapping[str, Any]], leaf: str, place: Place
) -> Mapping[str, np.ndarray]:
    """Return a leaf's values, those of a stacked leaf with the layers on axis 0."""
    slices = [values[name] for name in place.slice_names(leaf)]
    if place.axis is None:
        return slices[0]
    return {key: np.stack([each[key] for each in slices]) for key in slices[0]}


@in_turn
@partial(
    jax.jit, static_argnames=("kernel", "reference", "dtype", "axis", "one_by_one", "sharding")
)
def _merge(
    models: Sequence[Leaf],
    values: Mapping[str, Any],
    base: Leaf | None,
    kernel: Kernel,
    reference: int,
    dtype: Any,
    axis: int | None,
    one_by_one: bool,
    sharding: Sharding | None,
) -> tuple[jax.Array, jax.Array]:
    def merge(models: Any, values: Any, base: Any) -> jax.Array:
        return kernel(models, values, base=base, reference=reference, dtype=dtype)

    if axis is None:
        merged = merge(models, values, base)
    elif one_by_one:
        first = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0), (models, base))
        layers = (first[0], values, first[1])
        merged = jnp.moveaxis(jax.lax.map(lambda layer: merge(*layer), layers), 0, axis)
    else:
        merged = jax.vmap(merge, in_axes=(axis, 0, axis), out_axes=axis)(models, values, base)
    if sharding is not None:
        merged = jax.lax.with_sharding_constraint(merged, sharding)
    return merged, jnp.isfinite(merged).all()


def _fault(name: str, trees: Inputs[TreeFile], leaves: Inputs[Leaf], dtype: np.dtype[Any]) -> str:
    for tree, leaf in zip(trees.all, leaves.all, strict=True):
        # A sharded leaf has at most 32 bits, and may be in the memory of other processes.
        on_host = isinstance(leaf, np.ndarray)
        if not (all_finite(leaf, narrow=True) if on_host else jnp.isfinite(leaf).all()):
            return not_finite_message(tree.name, name, leaf.dtype)
    return overflow_message(name, dtype)
