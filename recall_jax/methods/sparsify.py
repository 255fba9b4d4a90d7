"""Sparse task vectors: which elements are kept, and the scale that they are given."""

import jax
import jax.numpy as jnp

from recall_jax.similarity.blocks import order_statistics

_ROWS = 256  # of a table whose columns are summed at once


def keep_largest(vector: jax.Array, density: jax.Array) -> jax.Array:
    """Which elements of a float32 vector are among its max(1, floor(density n)) largest |.|.

    All that equal the smallest of them are kept, as by the authors of TIES; none if density <= 0.
    Nothing is sorted.
    """
    magnitudes = jnp.abs(vector)
    # float32 holds 0.7 a little too small, and 7 of 10 elements are wanted.
    count = jnp.floor(density * (vector.size * (1 + 2.0**-22))).astype(jnp.int32)
    rank = vector.size - jnp.clip(count, 1, vector.size)
    (threshold,) = order_statistics(lambda index: magnitudes, 1, 1, (rank,))
    return (_bits(magnitudes) >= _bits(threshold)) & (density > 0)


def keep_at_random(vector: jax.Array, density: jax.Array, key: jax.Array) -> jax.Array:
    """Each element of a vector with probability `density`, drawn from `key`; all not finite."""
    drawn = jax.random.bernoulli(key, density.astype(jnp.float32), vector.shape)
    return drawn | ~jnp.isfinite(vector)  # a fault of the model's, which is to be told


def rescaled(kept: jax.Array, vector: jax.Array) -> jax.Array:
    """`kept` with the L1 norm of `vector`, unless one of their norms is below 1e-7."""
    before, after = tree_sum(jnp.abs(vector)), tree_sum(jnp.abs(kept))
    usable = (before >= 1e-7) & (after >= 1e-7)
    return kept * jnp.where(usable, before / jnp.where(usable, after, 1), 1)


def tree_sum(numbers: jax.Array) -> jax.Array:
    """The sum of any number of elements, by the tree, so that float32 loses next to nothing."""
    rest = numbers.ravel()
    while rest.size > 1:
        rows = min(_ROWS, rest.size)
        # Down the columns: on CPU a reduction of one long row is not vectorised.
        rest = jnp.pad(rest, (0, -rest.size % rows)).reshape(rows, -1).sum(axis=0)
    return rest.reshape(())


def _bits(numbers: jax.Array) -> jax.Array:
    # In the order of the numbers where none is negative, and no subnormal is taken for zero.
    return jax.lax.bitcast_convert_type(numbers, jnp.int32)
