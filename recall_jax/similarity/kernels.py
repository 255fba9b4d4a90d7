"""Compute kernels over all pairs of samples: inner products, squared distances, their median.

Distances use the inner-product form of centred points, which is one matrix product; negative values
due to rounding are clipped at zero.
"""

import jax
import jax.numpy as jnp

from recall_jax.errors import InputError
from recall_jax.similarity.blocks import count_dtype, order_statistics


def unit_norm(X: jax.Array) -> jax.Array:
    """Divide X by its Frobenius norm; zeros stay zeros.

    The largest entry is divided out first, so that no scale of X leaves the range of its dtype; the
    result does not depend on it, so neither does the gradient.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(X)))
    X = X / jnp.where(largest > 0, largest, 1)
    squared = jnp.sum(X * X)
    return X / jnp.sqrt(jnp.where(squared > 0, squared, 1))


def safe_sqrt(squared: jax.Array) -> jax.Array:
    """Return the square root; for zero and negative rounding errors, zero with gradient zero."""
    zero = squared <= 0  # written so that NaN stays NaN
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))


def inner_products(X: jax.Array, Y: jax.Array) -> jax.Array:
    """Return X Y^T (n, m), at full precision on every device."""
    return jnp.matmul(X, Y.T, precision="highest")


def squared_distances(X: jax.Array, index: jax.Array) -> jax.Array:
    """Return squared distances (b, n) of the samples `index` (b,) to all of X (n, E), centred.

    They are exactly zero between a sample and itself, and where rounding cannot separate two
    samples.
    """
    norms = jnp.sum(X * X, axis=1)
    total = norms[index][:, None] + norms[None, :]
    squared = total - 2 * inner_products(X[index], X)
    is_self = index[:, None] == jnp.arange(len(X))[None, :]
    return jnp.where(is_self | (squared <= 4 * jnp.finfo(X.dtype).eps * total), 0, squared)


def median_squared_distance(X: jax.Array, block_size: int, *, include_self: bool) -> jax.Array:
    """Return the median () squared distance over all ordered sample pairs of X (n, E), centred.

    `include_self` counts the pairs of a sample with itself. In blocks the value is as exact as at
    once, but has no gradient. Raises InputError if 32-bit integers cannot count the pairs.
    """
    n = len(X)
    if n >= 2**16 and count_dtype().itemsize < 8:
        raise InputError(
            f"32-bit integers cannot count the pairs of {n} samples: turn jax_enable_x64 on"
        )
    self_pairs = 0 if include_self else n  # these are zeros, so they have the lowest ranks
    others = n * n - self_pairs
    ranks = (self_pairs + (others - 1) // 2, self_pairs + others // 2)
    if block_size < n:
        middle = order_statistics(lambda index: squared_distances(X, index), n, block_size, ranks)
        return jnp.mean(middle)
    squared = squared_distances(X, jnp.arange(n))
    fixed = jax.lax.stop_gradient(squared)
    # Counting is many times faster than sorting; the gradient is that of the pairs in the middle.
    middle = order_statistics(lambda index: fixed[index], n, n, ranks)
    is_middle = [fixed == one for one in middle]
    return jnp.mean(jnp.stack([jnp.mean(squared, where=where) for where in is_middle]))
