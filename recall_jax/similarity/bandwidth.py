"""Compute the bandwidth sigma of the RBF kernel, in the units of the representations."""

import jax
import jax.numpy as jnp
import numpy as np


def pair_distances(X: jax.Array) -> jax.Array:
    """Return the squared distances (n (n - 1) / 2,) of all sample pairs i < j of X (n, E), float32.

    Uses direct differences, one row at a time: equal samples are at distance exactly zero.
    """
    n = X.shape[0]
    squared = jax.lax.map(lambda x: jnp.sum((X - x[None, :]) ** 2, axis=-1), X)
    first, second = np.triu_indices(n, k=1)
    return squared[first, second]


def median_bandwidth(squared_distances: jax.Array) -> jax.Array:
    """Return sigma with sigma^2 = median / 2, so that the kernel is exp(-d^2 / median d^2)."""
    return jnp.sqrt(0.5 * jnp.median(squared_distances))
