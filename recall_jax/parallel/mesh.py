"""Build the device mesh, and shard parameters and batches over it.

A mesh has four axes. Along `model`, different models are on different devices; along `data`, the
rows of a batch are sharded; along `fsdp`, the rows and every parameter, which is gathered where it
is used (Zhao et al. 2023, arXiv:2304.11277); along `tensor`, the heads, the MLP and the vocabulary,
which are computed separately (Shoeybi et al. 2019, arXiv:1909.08053). XLA inserts the collectives.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from recall_jax.errors import InputError
from recall_jax.models.axes import HEADS, HIDDEN, MLP, VOCAB, Axes, logical_axes

MODEL, DATA, FSDP, TENSOR = "model", "data", "fsdp", "tensor"
AXES = (MODEL, DATA, FSDP, TENSOR)

# The mesh axis that shards each logical axis of a parameter.
RULES: Mapping[str | None, str] = {VOCAB: TENSOR, HEADS: TENSOR, MLP: TENSOR, HIDDEN: FSDP}

BATCH_ROWS = (DATA, FSDP)
"""The axes of the mesh over which the rows of a batch are sharded."""


def parse_mesh(text: str) -> dict[str, int]:
    """Parse a text such as `data=2,fsdp=4` into the sizes of all axes; InputError if malformed."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise InputError(f"mesh {text!r}: write it such as data=2,fsdp=4,tensor=1")
        sizes[name] = int(size)
    return dict.fromkeys(AXES, 1) | sizes


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """Build a mesh of the first devices of all processes.

    Raises InputError if there are too few, or if several processes would leave some unused.
    """
    shape = [sizes.get(name, 1) for name in AXES]
    devices, needed = jax.devices(), math.prod(shape)
    if needed > len(devices):
        raise InputError(
            f"mesh {format_mesh(sizes)} needs {needed} devices; there are {len(devices)}"
        )
    if needed < len(devices) and jax.process_count() > 1:
        raise InputError(
            f"mesh {format_mesh(sizes)} takes {needed} of the {len(devices)} devices of "
            f"{jax.process_count()} processes: with several processes it must take them all"
        )
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed]
    )


def named_mesh(text: str) -> Mesh:
    """Build the mesh that a text for `parse_mesh` describes, or one of all devices for "auto".

    "auto" shards only over `fsdp`, for callers that do not know what must fit; others use
    `choose_mesh`. Raises InputError as `make_mesh` does.
    """
    return make_mesh({FSDP: jax.device_count()} if text == "auto" else parse_mesh(text))


def format_mesh(sizes: Mapping[str, int]) -> str:
    """Format sizes as `data=2,fsdp=4,tensor=1`, with `model` only if it is above 1."""
    return ",".join(
        f"{name}={sizes.get(name, 1)}" for name in AXES if name != MODEL or sizes.get(name, 1) > 1
    )


def choose_mesh(
    devices: int, *, parameters: int, gathered: int, memory: int, rows: int
) -> dict[str, int]:
    """Choose the axis sizes of a mesh of all `devices`: as much `data` as fits, then `fsdp`.

    `parameters` are the bytes of one copy of the largest unit, in the compute dtype, sharded over
    all devices. The largest block, `gathered` bytes of them, is gathered over `fsdp` at a time. A
    device then holds

        parameters / (fsdp * tensor) + (gathered / tensor where fsdp > 1)

    bytes, which must not exceed `memory`, what is left beyond its hidden states. `tensor` is the
    smallest size for which data * fsdp is at most `rows`, the rows of a batch, so that no device is
    idle, or larger if nothing else fits; `fsdp` is the smallest that fits.

    Raises:
        InputError: if no mesh of that many devices fits.
    """
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for tensor, fsdp in product(divisors, divisors):
        data, rest = divmod(devices, tensor * fsdp)
        held = parameters / fsdp + (gathered if fsdp > 1 else 0)
        if rest == 0 and data * fsdp <= rows and held <= memory * tensor:
            return dict.fromkeys(AXES, 1) | {DATA: data, FSDP: fsdp, TENSOR: tensor}
    raise InputError(
        f"{devices} devices with {memory / 2**20:,.0f} MiB each cannot hold what is computed at a "
        f"time, {parameters / 2**20:,.0f} MiB, whatever the mesh: use more devices, or larger ones"
    )


def partition_spec(axes: Axes, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Return the mesh axes that shard each dimension of a parameter.

    RULES decide. If a mesh axis does not divide its dimension (a vocabulary of 50,257, seven
    heads), it shards the longest other dimension that it divides, except that of stacked layers. If
    it divides none, the parameter is replicated along it.
    """
    shards: list[list[str]] = [[] for _ in shape]

    def shard(name: str, dimensions: Iterable[int]) -> bool:
        for dimension in dimensions:
            parts = math.prod(mesh.shape[other] for other in (*shards[dimension], name))
            if shape[dimension] % parts == 0:
                shards[dimension].append(name)
                return True
        return False

    by_rule = {RULES[axis]: dimension for dimension, axis in enumerate(axes) if axis in RULES}
    names = [name for name in by_rule if mesh.shape[name] > 1]
    longest = sorted(by_rule.values(), key=lambda dimension: -shape[dimension])
    for name in [name for name in names if not shard(name, [by_rule[name]])]:
        shard(name, longest)
    return PartitionSpec(*(tuple(by) if len(by) > 1 else by[0] if by else None for by in shards))


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """Return a NamedSharding for each leaf of a tree of parameters, or of one laid out like it.

    Leaves that are not recognized as parameters are replicated on every device.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        axes = logical_axes(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))
        if axes is None or len(axes) != leaf.ndim:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def put_parameters(tree: Any, mesh: Mesh) -> Any:
    """Copy the tree onto the devices of the mesh; no buffer is shared with the input."""
    # no alias, because a donated buffer is overwritten
    return jax.device_put(tree, parameter_shardings(tree, mesh), may_alias=False)


def gathered(tree: Any, mesh: Mesh) -> Any:
    """Gather parameters along `fsdp` within a program, so that they can be computed with."""
    shardings = jax.tree.map(
        lambda sharding: NamedSharding(mesh, without_fsdp(sharding.spec)),
        parameter_shardings(tree, mesh),
    )
    return jax.lax.with_sharding_constraint(tree, shardings)


def without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    """Return the sharding of a parameter once it is gathered along `fsdp`."""
    axes = (by if isinstance(by, tuple) else (by,) for by in spec)
    left = (tuple(name for name in by if name not in (FSDP, None)) for by in axes)
    return PartitionSpec(*(by or None for by in left))


def rows_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of rows, which are on `axis`, over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_ROWS))


def put_rows(batch: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Put a batch on the devices, its rows, on `axis`, sharded over `data` and `fsdp`."""
    return jax.device_put(batch, rows_sharding(mesh, axis))


def spread_over_all(
    shape: Sequence[int], mesh: Mesh, *, stacked: int | None = None
) -> NamedSharding:
    """Shard over all devices of a mesh along the longest dimension that they divide.

    The dimension of the layers, `stacked`, is left out. Replicated if they divide no dimension.
    """
    fitting = [
        dimension
        for dimension, size in enumerate(shape)
        if dimension != stacked and size and size % mesh.size == 0
    ]
    if not fitting:
        return NamedSharding(mesh, PartitionSpec())
    longest = max(fitting, key=lambda dimension: shape[dimension])
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, mesh.axis_names))
