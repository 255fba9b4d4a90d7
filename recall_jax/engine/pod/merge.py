"""Merging in rows layout, and the merged tensor handed to every process in the order of a file.

Elementwise kernels need nothing from other devices. Those that look at a whole tensor are given it
in one program over the mesh, in which XLA does what has to pass between devices. All programs are
started by the thread that iterates, in the same order in every process.
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

_WORD = 4  # bytes of what is summed: 16 bits alone are no type of every collective


class MergedRows(NamedTuple):
    """A merged tensor in rows layout, whether it is finite, and whether each of its inputs is.

    The base, where there is one, is the first of the inputs.
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
    """Merge one tensor of K models, given in rows layout: as `engine.chunks.merge_tensor`.

    `spec` is that of the merged tensor; `full` is for kernels that see it as it is, `replicated`
    for those of them that solve or decompose it: XLA would cut that into many small steps with
    messages between them, so every device does all of it, and has the bits that one device has.
    """
    newest, inputs = stored.newest, stored.all
    if not is_float(newest.dtype) or newest.size == 0:
        with in_x64(newest.dtype, spec.dtype):
            return MergedRows(newest.astype(spec.dtype), True, np.ones(len(inputs), bool))
    # As every process has them: what lies on devices of its own alone is no part of a program.
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
    """What `fold` gives of each device's rows, summed, and whether each of the inputs is finite.

    Of a tensor of the shape `full_shape` every device folds all of it.
    """
    shared = jax.tree.map(np.asarray, dict(values))
    with in_x64(*(array.dtype for array in inputs.all)):
        return _summed(fold, inputs.models, shared, inputs.base, full_shape, mesh)


def iterate_pieces(merged: MergedRows, spec: TensorSpec, mesh: Mesh) -> Iterator[Piece]:
    """The elements in the order of a file, a piece at a time, each on every device.

    A device gives the elements that it holds, and the sum over all, of bits, is the piece.
    """
    size = int(np.prod(spec.shape, dtype=np.int64))
    if size == 0:
        yield Piece(np.empty(0, spec.dtype), True, 0)
        return
    run = merged.rows.size // mesh.size
    starts = np.arange(mesh.size) * run
    for at, length, skip in spans(size, CHUNK):
        # On the host, as int32 does not count the elements of every tensor.
        own = np.clip(at - starts, -length, run).astype(np.int32)
        with in_x64(spec.dtype):
            yield Piece(_piece(merged.rows, own, mesh, length), merged.finite, skip)


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
    """Merged rows, whether they are finite, and whether each input is; of whole ones the `shape`.

    Rows that fill the layout are zero in every model, and finite once merged.
    """
    inputs = Inputs(models, base).all

    def merge(given: list[jax.Array], values: Mapping[str, Any]) -> jax.Array:
        own, given = (None, given) if base is None else (given[0], given[1:])
        return kernel(given, values, base=own, reference=reference, dtype=dtype)

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
    """Whether all elements are in float32, in which all is computed."""
    return jnp.all(jnp.isfinite(array.astype(jnp.float32)))


def _in_even_parts(array: jax.Array, shape: tuple[int, ...], mesh: Mesh) -> jax.Array:
    """A tensor as it is, or in a shape of the same order that the devices divide.

    What is not even XLA repeats on every device, and all that is made of it.
    """
    whole = unpadded(array, shape)
    if not shape or shape[0] % mesh.size == 0 or whole.size % mesh.size:
        return whole
    even = NamedSharding(mesh, PartitionSpec(AXES))
    return lax.with_sharding_constraint(whole.reshape(mesh.size, -1), even)


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
        own, models = (None, inputs) if base is None else (inputs[0], inputs[1:])
        found = fold(models, values, own)
        return found if full_shape is not None else lax.psum(found, AXES)

    inputs = Inputs(models, base).all
    given = inputs if full_shape is None else [unpadded(array, full_shape) for array in inputs]
    cut = ROWS if full_shape is None else PartitionSpec()
    specs = (PartitionSpec(), *[cut] * len(given))
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    finite = jnp.stack([*map(_is_finite, inputs)])
    everywhere = NamedSharding(mesh, PartitionSpec())
    return run(values, *given), lax.with_sharding_constraint(finite, everywhere)


@in_turn
@partial(jax.jit, static_argnames=("mesh", "length"))
def _piece(rows: jax.Array, starts: Any, mesh: Mesh, length: int) -> jax.Array:
    """`length` elements, of which the first is the device's own number `starts[device]`."""

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
    """The bits of elements (n,), so that -0.0 and NaN stay what they are in a sum with zeros."""
    elements = elements.astype(jnp.uint8) if elements.dtype == jnp.bool_ else elements
    together = max(_WORD // elements.dtype.itemsize, 1)
    filled = jnp.pad(elements, (0, -elements.size % together))
    rows = filled.reshape(-1, together) if together > 1 else filled
    return lax.bitcast_convert_type(rows, jnp.uint32)


def _elements(words: jax.Array, dtype: Any, length: int) -> jax.Array:
    """The elements (length,) of which `words` are the bits."""
    if dtype == jnp.bool_:
        return _elements(words, jnp.uint8, length).astype(jnp.bool_)
    return lax.bitcast_convert_type(words, dtype).reshape(-1)[:length]
