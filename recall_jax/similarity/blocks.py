"""Process samples in blocks, so that no array of n x n or more is in memory at once."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

_Tree = TypeVar("_Tree")
_DIGIT = 16  # bits of a number that one pass of `order_statistics` determines


def map_blocks(function: Callable[[jax.Array], _Tree], num_samples: int, block_size: int) -> _Tree:
    """Apply `function` to blocks of sample indices (b,); concatenate its results to (n, ...)."""
    if block_size >= num_samples:
        return function(jnp.arange(num_samples))
    full = num_samples - num_samples % block_size
    parts = jax.lax.map(function, jnp.arange(full).reshape(-1, block_size))
    joined = jax.tree.map(lambda part: part.reshape(full, *part.shape[2:]), parts)
    if full == num_samples:
        return joined
    rest = function(jnp.arange(full, num_samples))
    return jax.tree.map(lambda first, last: jnp.concatenate([first, last]), joined, rest)


def sum_blocks(function: Callable[[jax.Array], _Tree], num_samples: int, block_size: int) -> _Tree:
    """Return the sum of `function` over blocks of sample indices (b,)."""
    if block_size >= num_samples:
        return function(jnp.arange(num_samples))
    full = num_samples - num_samples % block_size
    # The last block, which may be shorter, is computed outside of the loop.
    rest = full if full < num_samples else full - block_size
    total = function(jnp.arange(rest, num_samples))

    def add(total: _Tree, index: jax.Array) -> tuple[_Tree, None]:
        return jax.tree.map(jnp.add, total, function(index)), None

    return jax.lax.scan(add, total, jnp.arange(rest).reshape(-1, block_size))[0]


def order_statistics(
    values: Callable[[jax.Array], jax.Array],
    num_samples: int,
    block_size: int,
    ranks: Sequence[int | jax.Array],
) -> jax.Array:
    """Return the numbers (r,) at these ranks, from zero, among all `values(index)` (b, m) >= 0.

    The result is exact, and no value is stored: each pass determines sixteen more bits of every
    answer by counting the numbers that begin with the bits found so far (non-negative floats are
    ordered as their bits are).
    """
    dtype = values(jnp.arange(1)).dtype
    keys = jnp.uint64 if dtype.itemsize == 8 else jnp.uint32
    counts = count_dtype()
    prefix, left = jnp.zeros(len(ranks), keys), jnp.asarray(ranks, counts)
    for shift in range(dtype.itemsize * 8 - _DIGIT, -1, -_DIGIT):

        def count(index: jax.Array, shift: int = shift, prefix: jax.Array = prefix) -> jax.Array:
            key = jax.lax.bitcast_convert_type(values(index), keys).ravel()
            high = key >> shift >> _DIGIT  # in two steps: a shift by all bits is undefined
            digit = (key >> shift) & (2**_DIGIT - 1)
            empty = jnp.zeros(2**_DIGIT, counts)
            return jnp.stack([empty.at[digit].add((high == one).astype(counts)) for one in prefix])

        below = jnp.cumsum(sum_blocks(count, num_samples, block_size), axis=1)
        digit = jax.vmap(lambda row, rank: jnp.searchsorted(row, rank, side="right"))(below, left)
        before = jnp.take_along_axis(below, jnp.maximum(digit - 1, 0)[:, None], axis=1)[:, 0]
        left = left - jnp.where(digit > 0, before, 0)
        prefix = (prefix << _DIGIT) | digit.astype(keys)
    return jax.lax.bitcast_convert_type(prefix, dtype)


def count_dtype() -> np.dtype:
    """Return the widest unsigned integer dtype that JAX is configured for."""
    return jax.dtypes.canonicalize_dtype(np.uint64)


def condense(X: jax.Array, Y: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
    """Return few rows with the same centred products: (E1 + E2 + 1, E1) for X and (.., E2) for Y.

    Updates the triangular factor of [1 X Y] block by block: its first row and column hold the
    means, and the rest has the Gram matrix of the centred columns. A reflection then transforms the
    rest so that its columns are centred too. All transformations are orthogonal: nothing is
    squared, so no digits are lost.
    """
    n, width = len(X), 1 + X.shape[1] + Y.shape[1]

    def update(R: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        points = [X[index] - X[:1], Y[index] - Y[:1]]  # exactly zero for a constant column
        block = jnp.concatenate([jnp.ones_like(points[0][:, :1]), *points], axis=1)
        return jnp.linalg.qr(jnp.concatenate([R, block]), mode="r"), None

    R = jnp.zeros((width, width), X.dtype)
    full = n - n % block_size
    R, _ = jax.lax.scan(update, R, jnp.arange(full).reshape(-1, block_size))
    if full < n:
        R, _ = update(R, jnp.arange(full, n))
    few = R[:, 1:].at[0].set(0)  # without the means, orthogonal to the first axis
    # Householder's reflection of the first axis onto that of the mean.
    axis = jnp.full(width, -(width**-0.5), X.dtype).at[0].add(1)
    projection = jnp.matmul(axis, few, precision="highest") / (0.5 * jnp.sum(axis * axis))
    few = few - axis[:, None] * projection[None, :]
    return few[:, : X.shape[1]], few[:, X.shape[1] :]
