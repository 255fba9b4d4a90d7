"""The rows layout: a tensor as it is read and merged by a pod, cut along its first axis on disk.

The rows lie in equal contiguous runs on all devices of the mesh, in the order of the mesh, and rows
of zeros fill the last runs. So whatever the mesh, each byte of a file is read by one process, in
few contiguous ranges, and what is elementwise needs no other device. A scalar is one row.
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
    """A tensor (R, …) of a model in rows layout: (ceil(R / D) D, …) over the D devices of `mesh`.

    Each process reads the rows of its own devices, and starts no program: any thread may call this.
    """
    spec = model.specs[name]
    return _laid_out(partial(model.read_rows, name), spec.shape, spec.dtype, mesh)


def put_rows_layout(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """A tensor that every process holds whole, in rows layout."""
    rows = array.reshape(array.shape or (1,))
    return _laid_out(lambda start, stop: rows[start:stop], array.shape, array.dtype, mesh)


def row_ranges(
    num_rows: int, mesh: Mesh, devices: Collection[jax.Device]
) -> Iterator[tuple[int, int, list[jax.Device]]]:
    """The rows (start, stop) of some devices, each range with those it is for, in order.

    Devices that follow one another in the mesh have one range together.
    """
    each = -(-num_rows // mesh.size)
    own = [(at, device) for at, device in enumerate(mesh.devices.flat) if device in devices]
    # Places that follow one another are as far from where they stand among those of the process.
    for _, run in groupby(enumerate(own), key=lambda item: item[1][0] - item[0]):
        places, together = zip(*(item for _, item in run), strict=True)
        start, stop = places[0] * each, (places[-1] + 1) * each
        yield min(start, num_rows), min(stop, num_rows), list(together)


def unpadded(array: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The tensor of that shape from its rows layout; in a program."""
    return array[: shape[0]] if shape else array[0]


def padded(array: jax.Array, mesh: Mesh) -> jax.Array:
    """The rows layout of a tensor; in a program."""
    rows = array.reshape(array.shape or (1,))
    filled = jnp.pad(rows, [(0, -rows.shape[0] % mesh.size), *[(0, 0)] * (rows.ndim - 1)])
    return jax.lax.with_sharding_constraint(filled, NamedSharding(mesh, ROWS))


def in_x64(*dtypes: Any) -> Any:
    """A context in which arrays of these dtypes exist in JAX, where any has eight bytes."""
    return jax.enable_x64(any(np.dtype(dtype).itemsize == 8 for dtype in dtypes))


def _laid_out(
    read: Callable[[int, int], np.ndarray],
    shape: Sequence[int],
    dtype: np.dtype[Any],
    mesh: Mesh,
) -> jax.Array:
    num_rows, *rest = shape or (1,)
    each = -(-num_rows // mesh.size)
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    shards = []
    with in_x64(dtype):
        for start, stop, devices in row_ranges(num_rows, mesh, own):
            rows = read(start, stop) if stop > start else np.empty((0, *rest), dtype)
            for place, device in enumerate(devices):
                part = rows[place * each : (place + 1) * each]
                if len(part) < each:
                    filled = np.zeros((each, *rest), dtype)
                    filled[: len(part)] = part
                    part = filled
                # On CPU rows that lie aligned in their file are used where they are mapped.
                shards.append(jax.device_put(part, device))
        return jax.make_array_from_single_device_arrays(
            (each * mesh.size, *rest), NamedSharding(mesh, ROWS), shards
        )
