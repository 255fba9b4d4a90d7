"""Elementwise merging in pieces of few fixed sizes, so that few programs serve every tensor.

A tensor of any shape is taken as one row of elements and cut into pieces of a power of two; the
last piece reaches back over the one before it instead of having a size of its own. Beside the
tensors themselves, memory is a few pieces, however large the tensors are.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recall_jax.engine.plan import is_float
from recall_jax.merging.methods import Kernel

_ROW = 1024
CHUNK = 1 << 20  # elements; larger ones gained nothing on CPU, smaller ones cost calls


class Piece(NamedTuple):
    """Merged elements of a tensor, of which the first `skip` belong to the piece before."""

    elements: jax.Array | np.ndarray
    finite: jax.Array | bool
    skip: int


def merge_pieces(
    stored: Sequence[np.ndarray],
    weights: np.ndarray,
    dtype: np.dtype[Any],
    *,
    kernel: Kernel,
    reference: int,
    chunk: int = CHUNK,
) -> Iterator[Piece]:
    """Merge one tensor of K models, given as on disk, with weights (K,) float32, piece by piece.

    Arithmetic is the kernel's, in float32, rounded once to `dtype`. Tensors that are not floating
    point (step counts, buffers) have no mean: they are the newest (last) model's. Pieces may not
    have been computed yet when they are handed out.
    """
    rows = [array.reshape(-1) for array in stored]
    if not is_float(rows[-1].dtype) or rows[-1].size == 0:
        yield Piece(rows[-1].astype(dtype, copy=False), True, 0)
        return
    # float64 exists in JAX only under x64; there equal elements still pass bit for bit.
    wide = np.dtype(np.float64) in {dtype, *(row.dtype for row in rows)}
    for start, size, skip in spans(rows[-1].size, chunk):
        with jax.enable_x64(wide):
            # On CPU jax uses a piece that lies aligned in its file where it is mapped.
            pieces = [row[start : start + size] for row in rows]
            elements, finite = _merge(pieces, weights, kernel, reference, dtype)
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
    pieces: Sequence[Any], weights: Any, kernel: Kernel, reference: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    merged = kernel(pieces, weights, reference=reference, dtype=dtype)
    # Down the columns first: on CPU a reduction of one long row is not vectorised.
    finite = jnp.isfinite(merged).reshape(-1, min(merged.size, _ROW))
    return merged, jnp.all(jnp.all(finite, axis=0))
