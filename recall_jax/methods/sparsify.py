"""Make task vectors sparse: choose the elements to keep, and rescale them."""

import jax
import jax.numpy as jnp

from recall_jax.similarity.blocks import order_statistics

_ROWS = 256  # summed at once, in the columns of a table


def keep_largest(vector: jax.Array, density: jax.Array) -> jax.Array:
    """Return a mask of the max(1, floor(density n)) largest magnitudes in a float32 vector.

    All elements equal to the smallest of these are kept, as by the authors of TIES; none if density
    is not positive. The vector is not sorted.
    """
    magnitudes = jnp.abs(vector)
    # 0.7 is a little too small in float32, but must keep 7 of 10 elements.
    count = jnp.floor(density * (vector.size * (1 + 2.0**-22))).astype(jnp.int32)
    rank = vector.size - jnp.clip(count, 1, vector.size)
    (threshold,) = order_statistics(lambda index: magnitudes, 1, 1, (rank,))
    return (_bits(magnitudes) >= _bits(threshold)) & (density > 0)


def keep_at_random(vector: jax.Array, density: jax.Array, key: jax.Array) -> jax.Array:
    """Return a mask that keeps each element with probability `density`, and all not finite."""
    drawn = jax.random.bernoulli(key, density.astype(jnp.float32), vector.shape)
    return drawn | ~jnp.isfinite(vector)  # so that the merge reports the fault


def rescaled(kept: jax.Array, vector: jax.Array) -> jax.Array:
    """Return `kept` with the L1 norm of `vector`, unless one of their norms is below 1e-7."""
    before, after = tree_sum(jnp.abs(vector)), tree_sum(jnp.abs(kept))
    usable = (before >= 1e-7) & (after >= 1e-7)
    return kept * jnp.where(usable, before / jnp.where(usable, after, 1), 1)


def tree_sum(numbers: jax.Array) -> jax.Array:
    """Return the sum () of any number of elements, added in a tree so that float32 is accurate."""
    rest = numbers.ravel()
    while rest.size > 1:
        rows = min(_ROWS, rest.size)
        # Sum columns: on CPU the reduction of one long row is not vectorised.
        rest = jnp.pad(rest, (0, -rest.size % rows)).reshape(rows, -1).sum(axis=0)
    return rest.reshape(())


def _bits(numbers: jax.Array) -> jax.Array:
    # Bits of numbers that are not negative sort as the numbers, and keep subnormals from zero.
    return jax.lax.bitcast_convert_type(numbers, jnp.int32)
