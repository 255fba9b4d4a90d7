"""Merging a tree leaf by leaf: a method's kernel on each leaf, or on each layer that it stacks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import methodcaller
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.engine.device import all_finite, is_not_finite, overflows
from recall_jax.engine.kernel import Kernel
from recall_jax.engine.sources import Inputs
from recall_jax.errors import InputError
from recall_jax.jobs.trees.files import Leaf, TreeFile, leaf_sharding, read_leaves
from recall_jax.jobs.trees.places import Place
from recall_jax.parallel.turns import in_turn

GROUP_BYTES = 1 << 28  # of one model: leaves that are read at once


def merge_leaves(
    trees: Inputs[TreeFile],
    places: Mapping[str, Place],
    values: Mapping[str, Mapping[str, Any]],
    *,
    kernel: Kernel,
    reference: int = -1,
    whole: Callable[[str], bool] = lambda name: False,
    dtype: np.dtype[Any] | None = None,
    mesh: Mesh | None = None,
    hear: Callable[[str, int], None] = lambda name, done: None,
) -> Iterator[tuple[str, Leaf]]:
    """The leaves of the merged tree, in the order of the newest (last) model's.

    `values` are those of each slice by its name. Leaves without a place are the newest's.
    Arithmetic is the kernel's, in float32, rounded once to `dtype`, else to the newest's. Over a
    mesh each leaf is spread over its devices; of slices that are `whole` by their name the kernel
    gets one layer after the other. Raises InputError naming leaf and model where a parameter is not
    finite.
    """
    newest = trees.newest
    done = 0
    for group in groups(newest.specs, GROUP_BYTES):
        shardings = shardings_of({name: newest.specs[name] for name in group}, places, mesh)
        leaves = _read(trees, group, places, shardings)
        for name in group:
            hear(name, done)
            done += 1
            if name not in places:
                yield name, leaves.newest.pop(name)
                continue
            stored = leaves.map(methodcaller("pop", name))
            out = newest.specs[name].dtype if dtype is None else dtype
            # float64 exists in JAX only under x64
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
                    any(map(whole, places[name].slice_names(name))),
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
    """The leaves of a group: all of the newest tree's, of the others those with a place."""
    shared, newest = [name for name in group if name in places], trees.newest
    return trees.map(lambda tree: read_leaves(tree, group if tree is newest else shared, shardings))


def groups(specs: Mapping[str, TensorSpec], most: int) -> Iterator[list[str]]:
    """Leaves in order, as many at once as have no more than `most` bytes, or one."""
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
    """The sharding of each leaf that has one."""
    found = {
        name: leaf_sharding(spec, mesh, places[name].axis if name in places else None)
        for name, spec in specs.items()
    }
    return {name: sharding for name, sharding in found.items() if sharding is not None}


def _values(
    values: Mapping[str, Mapping[str, Any]], leaf: str, place: Place
) -> Mapping[str, np.ndarray]:
    """A leaf's values; of one that stacks layers with an axis for these in front."""
    of_slices = [values[name] for name in place.slice_names(leaf)]
    if place.axis is None:
        return of_slices[0]
    return {key: np.stack([each[key] for each in of_slices]) for key in of_slices[0]}


@in_turn
@partial(jax.jit, static_argnames=("kernel", "reference", "dtype", "axis", "whole", "sharding"))
def _merge(
    models: Sequence[Leaf],
    values: Mapping[str, Any],
    base: Leaf | None,
    kernel: Kernel,
    reference: int,
    dtype: Any,
    axis: int | None,
    whole: bool,
    sharding: Sharding | None,
) -> tuple[jax.Array, jax.Array]:
    def merge(models: Any, values: Any, base: Any) -> jax.Array:
        return kernel(models, values, base=base, reference=reference, dtype=dtype)

    if axis is None:
        merged = merge(models, values, base)
    elif whole:
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
        # one that is spread is of no more than 32 bits, and may lie in other processes
        on_host = isinstance(leaf, np.ndarray)
        if not (all_finite(leaf, narrow=True) if on_host else jnp.isfinite(leaf).all()):
            return is_not_finite(tree.name, name, leaf.dtype)
    return overflows(name, dtype)
