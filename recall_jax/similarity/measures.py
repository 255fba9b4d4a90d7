"""Measures of similarity between two models' representations of the same n samples.

Each takes X and Y, (n, E) float32, row i of both from the same sample, and gives a scalar. To add
one, write it here (or in a file of its own) and name it in `MEASURES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


def paired_rbf(X: jax.Array, Y: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """Mean over samples of exp(-||x - y||^2 / (2 sigma^2)), in [0, 1]; RECALL's measure.

    Direct differences: the Gram form loses digits exactly where the two models nearly agree.
    """
    # Divided before squaring, so that no small or large sigma leaves the range of float32.
    squared = jnp.sum(((X - Y) / sigma) ** 2, axis=-1)
    return jnp.mean(jnp.exp(-0.5 * squared))


def row_cosine(X: jax.Array, Y: jax.Array) -> jax.Array:
    """Mean over samples of the cosine between x and y, in [-1, 1]; 0 for a row of zeros."""
    norms = jnp.linalg.norm(X, axis=-1) * jnp.linalg.norm(Y, axis=-1)
    return jnp.mean(jnp.sum(X * Y, axis=-1) / jnp.where(norms > 0, norms, 1.0))


def linear_cka(X: jax.Array, Y: jax.Array) -> jax.Array:
    """Linear centred kernel alignment, ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F), in [0, 1].

    Columns are centred. Invariant to rotation and isotropic scaling (Kornblith et al. 2019,
    arXiv 1905.00414, eq. 4-5). Computed from the (n, n) Gram matrices; 0 if one side is constant.
    """

    def gram(Z: jax.Array) -> jax.Array:
        centred = Z - jnp.mean(Z, axis=0, keepdims=True)
        return jnp.matmul(centred, centred.T, precision="highest")

    gram_x, gram_y = gram(X), gram(Y)
    norms = jnp.linalg.norm(gram_x) * jnp.linalg.norm(gram_y)
    return jnp.sum(gram_x * gram_y) / jnp.where(norms > 0, norms, 1.0)


class Measure(NamedTuple):
    """A measure as the comparison calls it: `function(X, Y, sigma)` or `function(X, Y)`."""

    function: Callable[..., jax.Array]
    takes_sigma: bool = False


MEASURES: dict[str, Measure] = {
    "rbf": Measure(paired_rbf, takes_sigma=True),
    "cosine": Measure(row_cosine),
    "linear_cka": Measure(linear_cka),
}
