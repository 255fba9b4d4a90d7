"""Define the rows layout, in which a pod reads and merges a tensor: sharded along its first axis.

Devices, in the order of the mesh, hold equal contiguous runs of rows; rows of zeros pad the last
runs. So on any mesh one process reads each byte of a file, in few contiguous ranges, and
elementwise computation needs no other device. A scalar is one row.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recall_jax.engine.plan import NamedModel
from recall_jax.parallel.mesh import AXES

ROWS = PartitionSpec(AXES)


def read_rows_layout(model: NamedModel, name: str, mesh: Mesh) -> jax.Array:
    """Return a tensor (R, …) of a model in rows layout: (ceil(R / D) D, …) over D devices.

    Each process reads the rows of its devices, and starts no program, so any thread may call this.
    """
    spec = model.specs[name]
    return _make_rows_layout(partial(model.read_rows, name), spec.shape, spec.dtype, mesh)


def put_rows_layout(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Return the rows layout of a tensor that every process holds in full."""
    rows = array.reshape(array.shape or (1,))
    return _make_rows_layout(lambda start, stop: rows[start:stop], array.shape, array.dtype, mesh)


def row_ranges(
    num_rows: int, mesh: Mesh, devices: Collection[jax.Device]
) -> Iterator[tuple[int, int, list[jax.Device]]]:
    """Yield the rows (start, stop) that some devices hold, each range with its devices, in order.

    Devices that are adjacent in the mesh share one range.
    """
    each = -(-num_rows // mesh.size)
    held = [(at, device) for at, device in enumerate(mesh.devices.flat) if device in devices]
    # In a run of adjacent devices, index in the mesh minus index in the list is constant.
    for _, run in groupby(enumerate(held), key=lambda item: item[1][0] - item[0]):
        places, together = zip(*(item for _, item in run), strict=True)
        start, stop = places[0] * each, (places[-1] + 1) * each
        yield min(start, num_rows), min(stop, num_rows), list(together)


def unpadded(array: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Return the tensor of this shape from its rows layout; to be called in a program."""
    return array[: shape[0]] if shape else array[0]


def padded(array: jax.Array, mesh: Mesh) -> jax.Array:
    """Return the rows layout of a tensor; to be called in a program."""
    rows = array.reshape(array.shape or (1,))
    filled = jnp.pad(rows, [(0, -rows.shape[0] % mesh.size), *[(0, 0)] * (rows.ndim - 1)])
    return jax.lax.with_sharding_constraint(filled, NamedSharding(mesh, ROWS))


def in_x64(*dtypes: Any) -> Any:
    """Return a context in which JAX has arrays of these dtypes, even if one has eight bytes."""
    return jax.enable_x64(any(np.dtype(dtype).itemsize == 8 for dtype in dtypes))


def _make_rows_layout(
    read: Callable[[int, int], np.ndarray],
    shape: Sequence[int],
    dtype: np.dtype[Any],
    mesh: Mesh,
) -> jax.Array:
    num_rows, *rest = shape or (1,)
    each = -(-num_rows // mesh.size)
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    shards = []
    with in_x64(dtype):
        for start, stop, devices in row_ranges(num_rows, mesh, local):
            rows = read(start, stop) if stop > start else np.empty((0, *rest), dtype)
            for place, device in enumerate(devices):
                part = rows[place * each : (place + 1) * each]
                if len(part) < each:
                    filled = np.zeros((each, *rest), dtype)
                    filled[: len(part)] = part
                    part = filled
                # On CPU, JAX uses rows that are aligned in their file without a copy.
                shards.append(jax.device_put(part, device))
        return jax.make_array_from_single_device_arrays(
            (each * mesh.size, *rest), NamedSharding(mesh, ROWS), shards
        )
