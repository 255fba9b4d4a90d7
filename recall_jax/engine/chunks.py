"""Merge tensors elementwise in chunks of a few fixed sizes, so that few programs serve them all.

A tensor of any shape is flattened and split into chunks whose size is a power of two; the last
chunk overlaps the one before it, rather than having a different size. Besides the tensors
themselves, memory holds only a few chunks, however large the tensors are. Methods that need full
tensors get them unsplit.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recall_jax.checkpoint.dtypes import is_float
from recall_jax.engine.kernel import Kernel
from recall_jax.engine.sources import Inputs

_ROW = 1024
CHUNK = 1 << 20  # elements: larger chunks gained nothing on CPU, smaller ones cost calls


class Piece(NamedTuple):
    """Hold merged elements of a tensor; the first `skip` of them repeat those of the piece before.

    `elements` is (n,) in the output dtype, `finite` () bool whether all of them are finite.
    """

    elements: jax.Array | np.ndarray
    finite: jax.Array | bool
    skip: int


def merge_tensor(
    stored: Inputs[np.ndarray],
    values: Mapping[str, Any],
    dtype: np.dtype[Any],
    *,
    kernel: Kernel,
    reference: int = -1,
    chunk: int | None = CHUNK,
) -> Iterator[Piece]:
    """Merge one tensor of K models, given as on disk, and yield pieces of at most `chunk` elements.

    If `chunk` is None, the kernel gets the full tensor. The kernel computes in float32 and rounds
    once to `dtype`; `values` are its values for this tensor. Tensors that are not floating point
    (step counts, buffers) have no mean: they are passed on from the newest model, and the plan has
    checked that all models agree. Pieces may still be being computed when they are yielded.
    """
    newest = stored.newest
    if not is_float(newest.dtype) or newest.size == 0:
        yield Piece(newest.reshape(-1).astype(dtype, copy=False), True, 0)
        return
    # JAX has float64 only under x64; there too, equal elements are passed on bit for bit.
    wide = np.dtype(np.float64) in {dtype, *(array.dtype for array in stored.all)}
    pieces = iter([(stored, 0)])
    if chunk is not None:
        flat = stored.map(lambda array: array.reshape(-1))
        chunks = spans(newest.size, chunk)
        # On CPU, JAX uses chunks that are aligned in their file without a copy.
        pieces = ((flat.map(itemgetter(slice(at, at + n))), skip) for at, n, skip in chunks)
    for piece, skip in pieces:
        with jax.enable_x64(wide):
            elements, finite = _merge(piece.models, values, piece.base, kernel, reference, dtype)
        yield Piece(elements, finite, skip)


def spans(size: int, chunk: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, length, overlap with the span before) of spans that cover `size` > 0 elements.

    All spans have the same length: the largest power of two up to both `size` and `chunk`.
    """
    length = 1 << (min(size, chunk).bit_length() - 1)
    for start in range(0, size, length):
        last = min(start, size - length)
        yield last, length, start - last


@partial(jax.jit, static_argnames=("kernel", "reference", "dtype"))
def _merge(
    models: Sequence[Any],
    values: Mapping[str, Any],
    base: Any,
    kernel: Kernel,
    reference: int,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    merged = kernel(models, values, base=base, reference=reference, dtype=dtype).reshape(-1)
    # Reduce columns first: on CPU the reduction of one long row is not vectorised.
    rows = jnp.isfinite(merged).reshape(-1, math.gcd(merged.size, _ROW))
    return merged, jnp.all(jnp.all(rows, axis=0))
