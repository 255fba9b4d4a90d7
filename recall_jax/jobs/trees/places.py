"""Determine the place of every leaf of a tree: its unit, or its units if it stacks layers.

Rules and recipes know tensors by names, each in a single unit. So each slice of a leaf has such a
name, which begins with its unit: layer 3 of `decoder/layers/mlp/kernel` is
`layers.3.decoder/layers/mlp/kernel`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from jax.tree_util import DictKey

from recall_jax.checkpoint.dtypes import is_float
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.units import EMBED, HEAD, layer_unit
from recall_jax.engine.plan import in_forward_order
from recall_jax.errors import InputError, shown, some
from recall_jax.jobs.trees.merge_trees import unit_of_path
from recall_jax.recipes.tree_patterns import TreePatterns, match_leaf

# The layout that `recall convert` writes.
CONVERTED = TreePatterns(embed=(f"{EMBED}/**",), layers=("layers/**",), axis=0)

_MOST_LAYERS = 10_000  # on an axis, since each gets a name before anything is read
_OPTIMIZER = re.compile(r"opt(imi[sz]er)?(_states?)?")
_ADVICE = "say in the recipe which leaves are layers: tree: {embed: PATTERN, layers: PATTERN}"


@dataclass(frozen=True)
class Place:
    """Hold a leaf's unit, or the units that it stacks on `axis`, in their order there."""

    units: tuple[str, ...]
    axis: int | None = None

    def slice_names(self, leaf: str) -> list[str]:
        """Return a name for each unit's slice, from which `units.unit_of_tensor` finds the unit."""
        path = leaf.replace(".", "_")  # a dot separates the unit's name from the rest
        return [f"{'embeddings' if unit == EMBED else unit}.{path}" for unit in self.units]


def place_leaves(
    specs: Mapping[str, TensorSpec], patterns: TreePatterns | None, model: str
) -> dict[str, Place]:
    """Return the place of every leaf that is merged: floating point leaves under the root.

    Without patterns the tree must have the layout of `recall convert`, or names with layer numbers.
    Raises InputError, which names leaves of the tree, if patterns and leaves do not match.
    """
    if patterns is None:
        patterns = CONVERTED if _is_converted(specs) else None
    root = "" if patterns is None or patterns.root is None else f"{patterns.root}/"
    leaves = {
        name.removeprefix(root): spec
        for name, spec in specs.items()
        if name.startswith(root) and is_float(spec.dtype)
    }
    if not leaves:
        what = f"tree.root {shown(patterns.root)}" if patterns and patterns.root else "the tree"
        raise InputError(f"{model}: {what} holds no floating point leaves; it has {some(specs, 3)}")
    if not root:
        _refuse_optimizer(leaves, model)
    found = _by_names(leaves, model) if patterns is None else _matched(leaves, patterns, model)
    return {f"{root}{name}": place for name, place in found.items()}


def slice_specs(
    specs: Mapping[str, TensorSpec], places: Mapping[str, Place]
) -> dict[str, TensorSpec]:
    """Return the dtype and shape of every slice by its name, in the order of the units."""
    slices = {}
    for leaf, place in places.items():
        shape = list(specs[leaf].shape)
        if place.axis is not None:
            del shape[place.axis]
        for name in place.slice_names(leaf):
            slices[name] = TensorSpec(specs[leaf].dtype, tuple(shape))
    return in_forward_order(slices)


def _matched(
    leaves: Mapping[str, TensorSpec], patterns: TreePatterns, model: str
) -> dict[str, Place]:
    places: dict[str, Place] = {}
    depth = 0
    for pattern in patterns.layers:
        group = dict(_layers(leaves, pattern, patterns.axis, depth, model))
        if twice := [name for name in group if name in places]:
            raise InputError(f"{model}: {twice[0]} matches two of tree.layers: narrow one of them")
        places |= group
        depth += len({unit for place in group.values() for unit in place.units})
    for pattern in patterns.embed:
        matched = [name for name in leaves if match_leaf(pattern, name) is not None]
        if not matched:
            raise InputError(
                f"{model}: tree.embed {shown(pattern)} matches no leaf; it has {some(leaves, 3)}"
            )
        if twice := [name for name in matched if name in places]:
            raise InputError(f"{model}: {twice[0]} matches tree.embed and another pattern")
        places |= {name: Place((EMBED,)) for name in matched}
    return {name: places.get(name, Place((HEAD,))) for name in leaves}


def _layers(
    leaves: Mapping[str, TensorSpec], pattern: str, axis: int | None, depth: int, model: str
) -> Iterator[tuple[str, Place]]:
    """Yield the leaves of one pattern of layers, the first of which is layer `depth`."""
    found = {name: match_leaf(pattern, name) for name in leaves}
    matches = {name: number for name, number in found.items() if number is not None}
    if not matches:
        raise InputError(
            f"{model}: tree.layers {shown(pattern)} matches no leaf; it has {some(leaves, 3)}"
        )
    if axis is None:
        numbers = {name: int(number) for name, number in matches.items()}
        order = _in_order(set(numbers.values()), pattern, model)
        yield from (
            (name, Place((layer_unit(depth + order[number]),))) for name, number in numbers.items()
        )
        return
    lengths: dict[int, str] = {}
    for name in matches:
        shape = leaves[name].shape
        if not -len(shape) <= axis < len(shape):
            raise InputError(
                f"{model}: {name} of shape {list(shape)} has no axis {axis} to stack layers on: "
                "narrow tree.layers"
            )
        if shape[axis] > _MOST_LAYERS:
            raise InputError(
                f"{model}: by tree.layers {shown(pattern)} {name} of shape {list(shape)} would "
                f"stack {shape[axis]} layers on axis {axis}: name the axis where its layers are"
            )
        lengths.setdefault(shape[axis], name)
        units = tuple(layer_unit(depth + index) for index in range(shape[axis]))
        yield name, Place(units, axis % len(shape))
    if len(lengths) > 1:
        examples = " and ".join(f"{length} in {name}" for length, name in [*lengths.items()][:2])
        raise InputError(
            f"{model}: tree.axis {axis} has different lengths, {examples}: it is not where all "
            "these leaves stack the layers"
        )


def _by_names(leaves: Mapping[str, TensorSpec], model: str) -> dict[str, Place]:
    """Return places by the leaves' names; InputError unless they have an embedding and layers."""
    units = {name: unit_of_path(tuple(map(DictKey, name.split("/")))) for name in leaves}
    numbers = {int(u.rpartition(".")[2]) for u in units.values() if u not in (EMBED, HEAD)}
    if not numbers or EMBED not in units.values():
        missing = "numbered layers" if not numbers else "an embedding"
        raise InputError(f"{model}: its names tell no {missing} ({some(leaves, 3)}): {_ADVICE}")
    order = _in_order(numbers, "the names", model)
    return {
        name: Place((unit if unit in (EMBED, HEAD) else layer_unit(order[int(unit[7:])]),))
        for name, unit in units.items()
    }


def _in_order(numbers: set[int], pattern: str, model: str) -> dict[int, int]:
    """Map layer numbers, which may start anywhere, to indices; InputError if one is missing."""
    first, last = min(numbers), max(numbers)
    if last - first >= len(numbers):
        missing = next(number for number in count(first) if number not in numbers)
        raise InputError(
            f"{model}: by {pattern} there are layers {shown(first)} to {shown(last)} but no "
            f"{shown(missing)}: {_ADVICE}"
        )
    return {number: number - first for number in numbers}


def _is_converted(specs: Mapping[str, TensorSpec]) -> bool:
    depths = {spec.shape[:1] for name, spec in specs.items() if name.startswith("layers/")}
    numbered = any(re.match(r"layers/\d", name) for name in specs)
    tops = {name.partition("/")[0] for name in specs}
    return (
        tops == {EMBED, "layers", HEAD} and len(depths) == 1 and () not in depths and not numbered
    )


def _refuse_optimizer(leaves: Mapping[str, TensorSpec], model: str) -> None:
    """Raise InputError if the tree holds an optimizer's state, which resembles parameters."""
    tops = {name.partition("/")[0] for name in leaves}
    if states := sorted(top for top in tops if _OPTIMIZER.fullmatch(top)):
        others = sorted(tops - set(states))
        raise InputError(
            f"{model} holds {states[0]} besides {', '.join(others) or 'nothing'}: say in the "
            "recipe where the parameters are, such as tree: "
            f"{{root: {others[0] if others else 'params'}}}"
        )
