"""The mesh of devices, and where each parameter lives on it.

A mesh has four axes. Along `model` whole models lie side by side; along `data` the rows of a batch
are spread; along `fsdp` the rows too, and every parameter, which is gathered where it is used (Zhao
et al. 2023, arXiv:2304.11277); along `tensor` the heads, the MLP and the vocabulary, which compute
apart (Shoeybi et al. 2019, arXiv:1909.08053). XLA puts in the collectives.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from recall_jax.errors import InputError
from recall_jax.models.axes import HEADS, HIDDEN, MLP, VOCAB, Axes, logical_axes

MODEL, DATA, FSDP, TENSOR = "model", "data", "fsdp", "tensor"
AXES = (MODEL, DATA, FSDP, TENSOR)

# Which axis of the mesh cuts which axis of a parameter.
RULES: Mapping[str, str] = {VOCAB: TENSOR, HEADS: TENSOR, MLP: TENSOR, HIDDEN: FSDP}

BATCH_ROWS = (DATA, FSDP)
"""The axes of the mesh over which the rows of a batch are spread."""


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of all axes in a text such as `data=2,fsdp=4`, 1 where left out; or InputError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise InputError(f"mesh {text!r}: write it such as data=2,fsdp=4,tensor=1")
        sizes[name] = int(size)
    return dict.fromkeys(AXES, 1) | sizes


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh of the first devices of all processes, or InputError where it does not fit them."""
    shape = [sizes.get(name, 1) for name in AXES]
    devices, needed = jax.devices(), math.prod(shape)
    if needed > len(devices):
        raise InputError(f"mesh {describe(sizes)} needs {needed} devices; there are {len(devices)}")
    if needed < len(devices) and jax.process_count() > 1:
        raise InputError(
            f"mesh {describe(sizes)} takes {needed} of the {len(devices)} devices of "
            f"{jax.process_count()} processes: with several processes it must take them all"
        )
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed]
    )


def describe(sizes: Mapping[str, int]) -> str:
    """Such as `data=2,fsdp=4,tensor=1`; models side by side are named where there are any."""
    return ",".join(
        f"{name}={sizes.get(name, 1)}" for name in AXES if name != MODEL or sizes.get(name, 1) > 1
    )


def partition_spec(axes: Axes, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Which axes of the mesh cut which dimension of a parameter.

    By RULES; an axis of the mesh that does not divide its dimension (a vocabulary of 50,257, seven
    heads) cuts the longest other one that it divides, stacked layers aside, and none where it
    divides none: there the parameter is repeated.
    """
    cuts: list[list[str]] = [[] for _ in shape]

    def divides(name: str, dimension: int) -> bool:
        parts = math.prod(mesh.shape[cut] for cut in (*cuts[dimension], name))
        return shape[dimension] % parts == 0

    for name in dict.fromkeys(RULES[axis] for axis in axes if axis in RULES):
        own = [d for d, axis in enumerate(axes) if axis in RULES and RULES[axis] == name]
        others = [d for d, axis in enumerate(axes) if axis in RULES and d not in own]
        places = [*own, *sorted(others, key=lambda d: -shape[d])]
        if mesh.shape[name] > 1 and (fitting := [d for d in places if divides(name, d)]):
            cuts[fitting[0]].append(name)
    return PartitionSpec(*(tuple(cut) if len(cut) > 1 else cut[0] if cut else None for cut in cuts))


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of a tree of parameters, or of anything laid out like them.

    Whatever is not known to be a parameter's is repeated on every device.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = (str(getattr(key, "key", getattr(key, "name", ""))) for key in path)
        axes = logical_axes("/".join(keys).split("/"))
        known = axes is not None and len(axes) == leaf.ndim
        spec = partition_spec(axes, leaf.shape, mesh) if known and axes else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def put_parameters(tree: Any, mesh: Mesh) -> Any:
    """The tree on the devices of the mesh, in buffers of its own."""
    # no alias, as a donated buffer is written
    return jax.device_put(tree, parameter_shardings(tree, mesh), may_alias=False)


def put_rows(batch: Any, mesh: Mesh, axis: int = 0) -> Any:
    """A batch on the devices, its rows, which are on `axis`, spread over `data` and `fsdp`."""
    rows = PartitionSpec(*[None] * axis, BATCH_ROWS)
    return jax.device_put(batch, NamedSharding(mesh, rows))
