"""Compare corresponding rows, x_i with y_i, of sides with the same axes and width."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from recall_jax.similarity.alignment import center
from recall_jax.similarity.kernels import median_squared_distance, unit_norm
from recall_jax.similarity.measure import SampleSum, checked, each_pair, inner_pairs, mean_score


@checked()
def paired_rbf(X: jax.Array, Y: jax.Array, sigma: float | jax.Array) -> jax.Array:
    """Mean over samples of exp(-||x_i - y_i||^2 / (2 sigma^2)), RECALL's measure.

    sigma is a standard deviation in the units of X and Y. Range [0, 1]; 1 for equal sides.
    Invariant only to a rotation or translation of both sides together. Uses direct differences: the
    Gram form loses digits exactly where two models nearly agree. Source: RECALL, arXiv 2510.20479.
    Cost n E.
    """
    return PAIRED_RBF.evaluate(X, Y, sigma=sigma)


@checked()
def row_cosine(X: jax.Array, Y: jax.Array) -> jax.Array:
    """Mean over samples of the cosine between x_i and y_i.

    Range [-1, 1]; a row of zeros has cosine 0. Invariant to a rotation of both sides together, and
    to the scale of every row. Cost n E.
    """
    return ROW_COSINE.evaluate(X, Y)


class _Points(NamedTuple):
    """Hold rows (b, E), and the bandwidth () of their side."""

    points: jax.Array
    sigma: jax.Array


def _bandwidth(X: jax.Array, block_size: int, sigma: float | jax.Array | None = None) -> jax.Array:
    """Return sigma (); for None, sigma^2 is half the median squared distance within the side."""
    if sigma is not None:
        return jnp.asarray(sigma, X.dtype)
    points = center(X)
    largest = jnp.max(jnp.abs(points))
    scale = jnp.where(largest > 0, largest, 1)  # so that no square leaves the range of the dtype
    return scale * jnp.sqrt(
        0.5 * median_squared_distance(points / scale, block_size, include_self=False)
    )


def _points(X: jax.Array, index: jax.Array, bandwidth: jax.Array) -> _Points:
    return _Points(X[index], bandwidth)


def _rbf(x: _Points, y: _Points) -> jax.Array:
    """Return the sum over these rows, with the bandwidth of x."""
    none = x.sigma <= 0
    # Divided before squaring, so that no small or large sigma leaves the range of float32.
    scaled = (x.points - y.points) / jnp.where(none, 1, x.sigma)
    squared = jnp.sum(scaled * scaled, axis=-1)
    alike = jnp.where(none, (squared == 0).astype(squared.dtype), jnp.exp(-0.5 * squared))
    return jnp.sum(alike)


def _directions(X: jax.Array, index: jax.Array, statistics: None) -> jax.Array:
    """Return rows (b, E) scaled to norm one; zeros stay zeros."""
    return jax.vmap(unit_norm)(X[index])


def _none(X: jax.Array, block_size: int) -> None:
    return None


PAIRED_RBF = SampleSum(
    _bandwidth, _points, each_pair(_rbf), mean_score, min_samples=1, same_width=True
)
ROW_COSINE = SampleSum(_none, _directions, inner_pairs, mean_score, min_samples=1, same_width=True)
