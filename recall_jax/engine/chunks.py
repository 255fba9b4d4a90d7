"""Elementwise merging in pieces of few fixed sizes, so that few programs serve every tensor.

A tensor of any shape is taken as one row of elements and cut into pieces of a power of two; the
last piece reaches back over the one before it instead of having a size of its own. Beside the
tensors themselves, memory is a few pieces, however large the tensors are. Methods that look at a
whole tensor get it as it is.
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
CHUNK = 1 << 20  # elements; larger ones gained nothing on CPU, smaller ones cost calls


class Piece(NamedTuple):
    """Merged elements of a tensor, of which the first `skip` belong to the piece before."""

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
    """Merge one tensor of K models, given as on disk, piece by piece; whole without a `chunk`.

    Arithmetic is the kernel's, in float32, rounded once to `dtype`; `values` are those of the
    tensor. Tensors that are not floating point (step counts, buffers) have no mean: they are the
    newest (last) model's, with which a plan finds all others to agree. Pieces may not have been
    computed yet when they are handed out.
    """
    newest = stored.newest
    if not is_float(newest.dtype) or newest.size == 0:
        yield Piece(newest.reshape(-1).astype(dtype, copy=False), True, 0)
        return
    # float64 exists in JAX only under x64; there equal elements still pass bit for bit.
    wide = np.dtype(np.float64) in {dtype, *(array.dtype for array in stored.all)}
    pieces = iter([(stored, 0)])
    if chunk is not None:
        flat = stored.map(lambda array: array.reshape(-1))
        cuts = spans(newest.size, chunk)
        # On CPU jax uses a piece that lies aligned in its file where it is mapped.
        pieces = ((flat.map(itemgetter(slice(at, at + n))), skip) for at, n, skip in cuts)
    for piece, skip in pieces:
        with jax.enable_x64(wide):
            elements, finite = _merge(piece.models, values, piece.base, kernel, reference, dtype)
        yield Piece(elements, finite, skip)


def spans(size: int, chunk: int) -> Iterator[tuple[int, int, int]]:
    """(start, length, overlap with the span before) of spans of one length that cover `size` > 0.

    The length is the largest power of two up to both `size` and `chunk`.
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
    # Down the columns first: on CPU a reduction of one long row is not vectorised.
    rows = jnp.isfinite(merged).reshape(-1, math.gcd(merged.size, _ROW))
    return merged, jnp.all(jnp.all(rows, axis=0))
