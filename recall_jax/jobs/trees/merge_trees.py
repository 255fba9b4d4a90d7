"""Merge parameter trees in memory: any pytrees, with per-layer or stacked leaves."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath, keystr, tree_flatten_with_path, tree_unflatten

from recall_jax.checkpoint.units import EMBED, HEAD, stacks_of, unit_of_tensor
from recall_jax.errors import InputError
from recall_jax.methods.average import weighted_average
from recall_jax.methods.weights import check_weights

# A unit's name or index, or ("stacked", axis, first_unit) for a leaf that stacks units on an axis.
Unit = str | int | tuple[str, int, int | str]
UnitOf = Callable[[KeyPath], Unit]


def merge_trees(
    trees: Sequence[Any],
    weights: jax.Array | np.ndarray,
    *,
    unit_of: UnitOf,
    reference: int = -1,
) -> Any:
    """Average K trees of one structure with the weights of each leaf's unit.

    `weights` is (K, U), each column summing to 1. `unit_of(path)` takes a leaf's JAX key path and
    returns its unit: a name ("embed", "layers.3", "head"), an index, or
    ("stacked", axis, first_unit) for a leaf with one unit per entry along `axis`. Arithmetic is
    float32; leaves keep the reference's dtype (float64 only under jax_enable_x64). Leaves that are
    not floating point (step counts, random keys) are copied from the reference. Raises InputError,
    which names the leaf, if trees or units do not match, and if `unit_of_path` would assign the
    layers of two stacks to the same units.
    """
    weights = check_weights(weights, len(trees))
    flat = [tree_flatten_with_path(tree) for tree in trees]
    _check_structures(flat)
    structure = flat[0][1]
    if unit_of is unit_of_path and (weights != weights[:, :1]).any():
        _check_one_stack([path for path, _ in flat[0][0]])
    if not -len(trees) <= reference < len(trees):
        raise InputError(
            f"reference {reference} is none of the {len(trees)} trees: "
            f"give an index from 0 to {len(trees) - 1}"
        )
    merged = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        path = leaves[0][0]
        arrays = [jnp.asarray(leaf) for _, leaf in leaves]
        _check_kinds(arrays, path)
        if not jnp.issubdtype(arrays[reference].dtype, jnp.floating):
            merged.append(leaves[reference][1])
            continue
        leaf_weights = _leaf_weights(weights, unit_of(path), arrays[reference].shape, path)
        merged.append(_average(arrays, leaf_weights, reference))
    return tree_unflatten(structure, merged)


def unit_of_path(path: KeyPath) -> str:
    """Return the unit of a leaf by the names on its path, for trees with one entry per layer.

    `layers_3`, `layers/3`, `blocks.3`, Linen's `TransformerBlock_3` and similar names are layer 3;
    names such as `embed` and `token_embedding` are `embed`; all others are `head`. For other trees
    pass `merge_trees` a custom function.
    """
    return unit_of_tensor(dotted_path(path))


def dotted_path(path: KeyPath) -> str:
    """Write a path in the form of a tensor's name: `encoder.block.3.w.` for `encoder/Block_3/w`."""
    name = keystr(path, simple=True, separator=".").lower() + "."
    return re.sub(r"(\w*(?:layers?|blocks?)|\bh)_(\d+)\.", r"\1.\2.", name)


@partial(jax.jit, static_argnames="reference")
def _average(arrays: list[jax.Array], weights: jax.Array, reference: int) -> jax.Array:
    return weighted_average(arrays, weights, reference=reference, dtype=arrays[reference].dtype)


def _leaf_weights(
    weights: np.ndarray, unit: Unit, shape: tuple[int, ...], path: KeyPath
) -> np.ndarray:
    """Return weights (K, 1, ...) for a leaf in one unit, (K, 1, ..., L, ..., 1) for L units."""
    num_models, num_units = weights.shape
    ones = (1,) * len(shape)
    if isinstance(unit, tuple):
        if len(unit) != 3 or unit[0] != "stacked":
            raise InputError(
                f'unit_of gave {unit} for {keystr(path)}: give ("stacked", axis, first_unit)'
            )
        axis, first = unit[1], _index(unit[2], num_units, path)
        if not isinstance(axis, int | np.integer) or not -len(shape) <= axis < len(shape):
            raise InputError(
                f"{keystr(path)} of shape {shape} has no axis {axis} to stack units on"
            )
        length = shape[axis]
        if first + length > num_units:
            raise InputError(
                f"{keystr(path)} stacks {length} units from unit {first} on, "
                f"but the weights have {num_units} units"
            )
        dimensions = list(ones)
        dimensions[axis] = length
        return weights[:, first : first + length].reshape(num_models, *dimensions)
    return weights[:, _index(unit, num_units, path)].reshape(num_models, *ones)


def _index(unit: str | int, num_units: int, path: KeyPath) -> int:
    if unit == EMBED:
        index = 0
    elif unit == HEAD:
        index = num_units - 1
    elif isinstance(unit, str):
        match = re.fullmatch(r"layers\.(\d+)", unit)
        index = int(match.group(1)) + 1 if match else -1
        if index >= num_units - 1:
            index = -1
    else:
        is_index = isinstance(unit, int | np.integer) and not isinstance(unit, bool)
        index = int(unit) if is_index else -1
    if not 0 <= index < num_units:
        raise InputError(
            f"unit_of gave {unit!r} for {keystr(path)}, which is none of the {num_units} units"
        )
    return index


def _check_one_stack(paths: Sequence[KeyPath]) -> None:
    stacks = stacks_of(map(dotted_path, paths))
    if len(stacks) > 1:
        raise InputError(
            f"the trees have more than one stack of layers, {' and '.join(stacks)}, which "
            "unit_of_path does not distinguish: give a custom unit_of, or one weight for all"
        )


def _check_structures(flat: list[tuple[list[tuple[KeyPath, Any]], Any]]) -> None:
    first, structure = flat[0]
    names = {keystr(path) for path, _ in first}
    for index, (leaves, other) in enumerate(flat[1:], start=1):
        if other != structure:
            others = {keystr(path) for path, _ in leaves}
            if names == others:
                raise InputError(
                    f"tree {index} is built unlike tree 0: same leaves, other containers "
                    f"({_shortened(other)}, not {_shortened(structure)})"
                )
            raise InputError(
                f"tree {index} is built unlike tree 0: only in tree 0 "
                f"{sorted(names - others)[:4]}, only in tree {index} {sorted(others - names)[:4]}"
            )
        for (path, leaf), (_, other_leaf) in zip(first, leaves, strict=True):
            expected, shape = np.shape(leaf), np.shape(other_leaf)
            if shape != expected:
                raise InputError(
                    f"{keystr(path)} has shape {expected} in tree 0 and {shape} in tree {index}"
                )


def _check_kinds(arrays: Sequence[jax.Array], path: KeyPath) -> None:
    """Raise InputError for a leaf that is floating point in only some of the trees.

    Also for complex numbers that differ, since they would be copied and not merged.
    """
    for index, array in enumerate(arrays):
        floats = [jnp.issubdtype(each.dtype, jnp.floating) for each in (array, arrays[0])]
        if floats[0] != floats[1]:
            raise InputError(
                f"{keystr(path)} is {arrays[0].dtype} in tree 0 and {array.dtype} in tree {index}: "
                "integers cannot be merged with floats"
            )
        if jnp.iscomplexobj(array) and not np.array_equal(array, arrays[0]):
            raise InputError(
                f"{keystr(path)} is {array.dtype}, and not the same in tree 0 and tree {index}: "
                "complex numbers are not merged, give real and imaginary parts separately"
            )


def _shortened(structure: Any, most: int = 80) -> str:
    text = " ".join(str(structure).split())
    return text if len(text) <= most else text[:most] + "…"
