"""Merge tensors in rows layout, and give every process the merged tensor in the order of a file.

Elementwise kernels need nothing from other devices. Kernels that need full tensors run in one
program over the mesh, in which XLA inserts the communication. The iterating thread starts all
programs, in the same order in every process.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recall_jax.checkpoint.dtypes import is_float
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.engine.chunks import CHUNK, Piece, spans
from recall_jax.engine.kernel import Kernel
from recall_jax.engine.layout import Fold
from recall_jax.engine.pod.rows import ROWS, in_x64, padded, unpadded
from recall_jax.engine.sources import Inputs
from recall_jax.parallel.mesh import AXES
from recall_jax.parallel.turns import in_turn

_WORD = 4  # bytes: not every collective supports types of 16 bits


class MergedRows(NamedTuple):
    """Hold a merged tensor in rows layout, and whether it and each of its inputs are finite.

    `inputs_finite` is (K,) bool, or (K + 1,) with the base first.
    """

    rows: jax.Array
    finite: jax.Array | bool
    inputs_finite: jax.Array | np.ndarray


def merge_rows(
    stored: Inputs[jax.Array],
    values: Mapping[str, Any],
    spec: TensorSpec,
    *,
    kernel: Kernel,
    reference: int = -1,
    full: bool = False,
    replicated: bool = False,
    mesh: Mesh,
) -> MergedRows:
    """Merge one tensor of K models, given in rows layout, as `engine.chunks.merge_tensor` does.

    `spec` is that of the merged tensor; `full` is for kernels that need the full tensor,
    `replicated` for those of them that solve or decompose it. XLA would split that into many small
    steps with messages in between, so every device does all of it, with the same bits as a single
    device.
    """
    newest, inputs = stored.newest, stored.all
    if not is_float(newest.dtype) or newest.size == 0:
        with in_x64(newest.dtype, spec.dtype):
            return MergedRows(newest.astype(spec.dtype), True, np.ones(len(inputs), bool))
    # As numpy arrays, equal in every process: a program cannot use arrays of one process only.
    shared = jax.tree.map(np.asarray, dict(values))
    shape = spec.shape if full else None
    with in_x64(spec.dtype, *(array.dtype for array in inputs)):
        return MergedRows(
            *_merged(
                stored.models,
                shared,
                stored.base,
                kernel,
                reference,
                spec.dtype,
                shape,
                replicated,
                mesh,
            )
        )


def sum_rows(
    fold: Fold,
    inputs: Inputs[jax.Array],
    values: Mapping[str, Any],
    *,
    full_shape: tuple[int, ...] | None,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Return the sum of `fold` over each device's rows, and whether each of the inputs is finite.

    If `full_shape` is given, every device folds the full tensor of that shape instead.
    """
    shared = jax.tree.map(np.asarray, dict(values))
    with in_x64(*(array.dtype for array in inputs.all)):
        return _summed(fold, inputs.models, shared, inputs.base, full_shape, mesh)


def iterate_pieces(merged: MergedRows, spec: TensorSpec, mesh: Mesh) -> Iterator[Piece]:
    """Yield the elements of a merged tensor in the order of a file, each piece on every device.

    A device contributes the elements that it holds, and a sum of bits over all devices is the
    piece.
    """
    size = int(np.prod(spec.shape, dtype=np.int64))
    if size == 0:
        yield Piece(np.empty(0, spec.dtype), True, 0)
        return
    run = merged.rows.size // mesh.size
    starts = np.arange(mesh.size) * run
    for at, length, skip in spans(size, CHUNK):
        # Computed on the host, as int32 cannot count the elements of every tensor.
        first = np.clip(at - starts, -length, run).astype(np.int32)
        with in_x64(spec.dtype):
            yield Piece(_piece(merged.rows, first, mesh, length), merged.finite, skip)


@in_turn
@partial(jax.jit, static_argnames=("kernel", "reference", "dtype", "shape", "replicated", "mesh"))
def _merged(
    models: Sequence[jax.Array],
    values: Mapping[str, Any],
    base: jax.Array | None,
    kernel: Kernel,
    reference: int,
    dtype: Any,
    shape: tuple[int, ...] | None,
    replicated: bool,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return merged rows, whether they are finite, and whether each input is.

    Full tensors have a `shape`. Rows that pad the layout are zero in every model, and finite once
    merged.
    """
    inputs = Inputs(models, base).all

    def merge(given: list[jax.Array], values: Mapping[str, Any]) -> jax.Array:
        full_base, given = (None, given) if base is None else (given[0], given[1:])
        return kernel(given, values, base=full_base, reference=reference, dtype=dtype)

    if shape is None:
        rows = padded(merge(inputs, values), mesh)
    elif replicated:
        everywhere = PartitionSpec()
        each = jax.shard_map(merge, mesh=mesh, in_specs=everywhere, out_specs=everywhere)
        rows = padded(each([unpadded(array, shape) for array in inputs], values), mesh)
    else:
        given = [_in_even_parts(array, shape, mesh) for array in inputs]
        rows = padded(merge(given, values).reshape(shape), mesh)
    finite = jnp.stack([jnp.all(jnp.isfinite(rows)), *map(_is_finite, inputs)])
    finite = lax.with_sharding_constraint(finite, NamedSharding(mesh, PartitionSpec()))
    return rows, finite[0], finite[1:]


def _is_finite(array: jax.Array) -> jax.Array:
    """Return whether all elements are finite in float32, in which everything is computed."""
    return jnp.all(jnp.isfinite(array.astype(jnp.float32)))


def _in_even_parts(array: jax.Array, shape: tuple[int, ...], mesh: Mesh) -> jax.Array:
    """Return a tensor unchanged, or reshaped so that the devices divide it evenly.

    XLA would replicate an uneven tensor on every device, and everything computed from it.
    """
    full = unpadded(array, shape)
    if not shape or shape[0] % mesh.size == 0 or full.size % mesh.size:
        return full
    even = NamedSharding(mesh, PartitionSpec(AXES))
    return lax.with_sharding_constraint(full.reshape(mesh.size, -1), even)


@in_turn
@partial(jax.jit, static_argnames=("fold", "full_shape", "mesh"))
def _summed(
    fold: Fold,
    models: Sequence[jax.Array],
    values: Mapping[str, Any],
    base: jax.Array | None,
    full_shape: tuple[int, ...] | None,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    def local(values: Mapping[str, Any], *inputs: jax.Array) -> jax.Array:
        local_base, models = (None, inputs) if base is None else (inputs[0], inputs[1:])
        found = fold(models, values, local_base)
        return found if full_shape is not None else lax.psum(found, AXES)

    inputs = Inputs(models, base).all
    given = inputs if full_shape is None else [unpadded(array, full_shape) for array in inputs]
    spec = ROWS if full_shape is None else PartitionSpec()
    specs = (PartitionSpec(), *[spec] * len(given))
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    finite = jnp.stack([*map(_is_finite, inputs)])
    everywhere = NamedSharding(mesh, PartitionSpec())
    return run(values, *given), lax.with_sharding_constraint(finite, everywhere)


@in_turn
@partial(jax.jit, static_argnames=("mesh", "length"))
def _piece(rows: jax.Array, starts: Any, mesh: Mesh, length: int) -> jax.Array:
    """Return `length` elements, starting at each device's element number `starts[device]`."""

    def local(rows: jax.Array, start: jax.Array) -> jax.Array:
        elements, first = rows.reshape(-1), start[0]
        window = min(length, elements.size)
        at = jnp.clip(first, 0, elements.size - window)
        near = jnp.pad(lax.dynamic_slice(elements, (at,), (window,)), (length, length))
        piece = lax.dynamic_slice(near, (first - at + length,), (length,))
        return _elements(lax.psum(_words(piece), AXES), piece.dtype, length)

    specs = (ROWS, PartitionSpec(AXES))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())(rows, starts)


def _words(elements: jax.Array) -> jax.Array:
    """Return the bits of elements (n,), so that -0.0 and NaN are kept in a sum with zeros."""
    elements = elements.astype(jnp.uint8) if elements.dtype == jnp.bool_ else elements
    together = max(_WORD // elements.dtype.itemsize, 1)
    filled = jnp.pad(elements, (0, -elements.size % together))
    rows = filled.reshape(-1, together) if together > 1 else filled
    return lax.bitcast_convert_type(rows, jnp.uint32)


def _elements(words: jax.Array, dtype: Any, length: int) -> jax.Array:
    """Return the elements (length,) whose bits are `words`."""
    if dtype == jnp.bool_:
        return _elements(words, jnp.uint8, length).astype(jnp.bool_)
    return lax.bitcast_convert_type(words, dtype).reshape(-1)[:length]
