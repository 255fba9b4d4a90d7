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
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}: give a number above 0")
    scores = jnp.asarray(similarity, jnp.float32) / jnp.float32(temperature)
    return jax.nn.softmax(scores, axis=0)
