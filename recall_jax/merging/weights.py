"""Weights of K models per unit."""

import jax
import jax.numpy as jnp
import numpy as np

from recall_jax.errors import InputError


def layer_weights(similarity: jax.Array | np.ndarray, *, temperature: float = 1.0) -> jax.Array:
    """RECALL's weights: softmax over the models of S / temperature (arXiv 2510.20479).

    `similarity` is (K, U) or (K,); the result has its shape, float32, and sums to 1 over K.
    Raises InputError unless temperature > 0.
    """
    if not np.float32(temperature) > 0:
        raise InputError(
            f"temperature is {temperature}: give a number above 0 that float32 can hold"
        )
    return _softmax(jnp.asarray(similarity, jnp.float32), np.float32(temperature))


@jax.jit  # one program, where each operation on its own would be one
def _softmax(scores: jax.Array, temperature: jax.Array) -> jax.Array:
    # Relative to the largest before the division, which could overflow; softmax does not change.
    relative = scores - jnp.max(scores, axis=0, keepdims=True)
    return jax.nn.softmax(relative / temperature, axis=0)
