"""Centred kernel alignment (CKA): the cosine of two centred kernels over the samples.

Biased CKA grows with width over samples, and nears one for unrelated representations that are much
wider than they have samples; the debiased forms do not.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recall_jax.similarity.alignment import center
from recall_jax.similarity.centred import kernel_rows
from recall_jax.similarity.kernels import inner_products, unit_norm
from recall_jax.similarity.measure import Rows, Sides, checked, cosine_score


@checked()
def linear_cka(X: jax.Array, Y: jax.Array) -> jax.Array:
    """Linear CKA: ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F), the columns centred.

    Range [0, 1]; 0 where a side is constant. Invariant to rotation, isotropic scaling and
    translation. Source: Kornblith et al. 2019, arXiv 1905.00414, eq. 4-5. Cost n E1 E2, or
    n^2 (E1 + E2) by the Gram matrices where samples are fewer than features.
    """
    return _of_features_or_samples(LINEAR, LINEAR_FEATURES, X, Y)


@checked()
def debiased_linear_cka(X: jax.Array, Y: jax.Array) -> jax.Array:
    """Linear CKA from unbiased estimators of HSIC; at least 4 samples.

    Range (-1, 1], near 0 for unrelated representations of any width; 0 where a side is constant.
    Invariances and cost as `linear_cka`. Source: Song et al. 2012; Kornblith's published code.
    """
    return _of_features_or_samples(DEBIASED_LINEAR, DEBIASED_LINEAR_FEATURES, X, Y)


@checked()
def rbf_cka(X: jax.Array, Y: jax.Array, threshold: float = 0.5) -> jax.Array:
    """CKA with the kernel exp(-||x_i - x_j||^2 / (2 sigma^2)).

    sigma is `threshold` times the root of the median squared distance, each side its own, a
    sample's distance to itself included. Range [0, 1]; 0 where a side is constant. Invariant to
    rotation, isotropic scaling and translation. Source: Kornblith et al. 2019. Cost n^2 (E1 + E2).
    """
    return RBF.evaluate(X, Y, threshold=threshold)


@checked()
def debiased_rbf_cka(X: jax.Array, Y: jax.Array, threshold: float = 0.5) -> jax.Array:
    """`rbf_cka` from unbiased estimators of HSIC; range (-1, 1], at least 4 samples.

    Near 0 for unrelated representations. Source: Song et al. 2012. Cost n^2 (E1 + E2).
    """
    return DEBIASED_RBF.evaluate(X, Y, threshold=threshold)


class _Features(NamedTuple):
    """Points (n, E), centred, of norm one; squared norms (n,); the kernel's own product ()."""

    points: jax.Array
    diagonal: jax.Array
    own: jax.Array


def _features(X: jax.Array, debiased: bool) -> _Features:
    points = unit_norm(center(X))
    diagonal = jnp.sum(points * points, axis=1)
    side = _Features(points, diagonal, jnp.zeros((), X.dtype))
    return side._replace(own=_product(side, side, debiased))


def _product(x: _Features, y: _Features, debiased: bool) -> jax.Array:
    """Inner product of the centred linear kernels, from features alone: no n x n."""
    product = jnp.sum(inner_products(x.points.T, y.points.T) ** 2)
    if not debiased:
        return product
    n = len(x.points)
    # The rows of a centred linear kernel sum to zero, so without the diagonal to minus that.
    diagonals = jnp.sum(x.diagonal * y.diagonal) * (1 + 2 / (n - 2))
    return product - diagonals + jnp.sum(x.diagonal) * jnp.sum(y.diagonal) / ((n - 1) * (n - 2))


def _from_features(x: _Features, y: _Features, debiased: bool) -> jax.Array:
    return cosine_score(_product(x, y, debiased), x.own, y.own, len(x.points))


LINEAR = kernel_rows("linear")
RBF = kernel_rows("rbf")
DEBIASED_LINEAR = kernel_rows("linear", debiased=True)
DEBIASED_RBF = kernel_rows("rbf", debiased=True)
LINEAR_FEATURES = Sides(
    partial(_features, debiased=False), partial(_from_features, debiased=False), moments=True
)
DEBIASED_LINEAR_FEATURES = Sides(
    partial(_features, debiased=True), partial(_from_features, debiased=True), least=4
)


def _of_features_or_samples(
    samples: Rows, features: Sides, X: jax.Array, Y: jax.Array
) -> jax.Array:
    """The same value at the cost of the smaller of samples and features."""
    narrow = len(X) > max(X.shape[1], Y.shape[1])
    return features.evaluate(X, Y) if narrow else samples.evaluate(X, Y)
