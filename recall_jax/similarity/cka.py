"""Centred kernel alignment (CKA) is the cosine of two centred kernels over the samples.

Biased CKA grows with the ratio of width to samples, and approaches one for unrelated
representations that are much wider than they have samples; the debiased forms do not.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from recall_jax.similarity.alignment import center
from recall_jax.similarity.centred import kernel_rows
from recall_jax.similarity.kernels import inner_products, unit_norm
from recall_jax.similarity.measure import SidePair, checked, cosine_score


@checked()
def linear_cka(X: jax.Array, Y: jax.Array) -> jax.Array:
    """Linear CKA: ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F), with centred columns.

    Range [0, 1]; 0 if a side is constant. Invariant to rotation, isotropic scaling and translation.
    Source: Kornblith et al. 2019, arXiv 1905.00414, eq. 4-5. Cost n E1 E2, or n^2 (E1 + E2) by the
    Gram matrices if there are fewer samples than features.
    """
    narrow = len(X) > max(X.shape[1], Y.shape[1])
    return (LINEAR_FEATURES if narrow else LINEAR).evaluate(X, Y)


@checked()
def debiased_linear_cka(X: jax.Array, Y: jax.Array) -> jax.Array:
    """Linear CKA from unbiased estimators of HSIC; at least 4 samples.

    Range (-1, 1], near 0 for unrelated representations of any width; 0 if a side is constant, and
    undefined, so that rounding decides, if all samples of a side are equally far apart. Invariances
    as `linear_cka`. Source: Song et al. 2012; Kornblith's published code. Cost n^2 (E1 + E2):
    computed from features, it would lose digits to a sample that outweighs the others.
    """
    return DEBIASED_LINEAR.evaluate(X, Y)


@checked()
def rbf_cka(X: jax.Array, Y: jax.Array, threshold: float = 0.5) -> jax.Array:
    """CKA with the kernel exp(-||x_i - x_j||^2 / (2 sigma^2)).

    sigma is `threshold` times the root of the median squared distance, computed for each side, with
    each sample's distance to itself included. Range [0, 1]; 0 if a side is constant. Invariant to
    rotation, isotropic scaling and translation. Source: Kornblith et al. 2019. Cost n^2 (E1 + E2).
    """
    return RBF.evaluate(X, Y, threshold=threshold)


@checked()
def debiased_rbf_cka(X: jax.Array, Y: jax.Array, threshold: float = 0.5) -> jax.Array:
    """`rbf_cka` from unbiased estimators of HSIC; at least 4 samples.

    Range (-1, 1], near 0 for unrelated representations; undefined where `debiased_linear_cka` is.
    Source: Song et al. 2012. Cost n^2 (E1 + E2).
    """
    return DEBIASED_RBF.evaluate(X, Y, threshold=threshold)


class _Features(NamedTuple):
    """Hold points (n, E), centred, of norm one, and their kernel's squared norm ()."""

    points: jax.Array
    squared_norm: jax.Array


def _features(X: jax.Array) -> _Features:
    points = unit_norm(center(X))
    return _Features(points, _product(points, points))


def _product(X: jax.Array, Y: jax.Array) -> jax.Array:
    """Return ||X^T Y||_F^2, the inner product of the linear kernels, without an n x n array."""
    product = inner_products(X.T, Y.T)
    return jnp.sum(product * product)


def _from_features(x: _Features, y: _Features) -> jax.Array:
    return cosine_score(_product(x.points, y.points), x.squared_norm, y.squared_norm, len(x.points))


LINEAR = kernel_rows("linear")
LINEAR_FEATURES = SidePair(_features, _from_features)
RBF = kernel_rows("rbf")
DEBIASED_LINEAR = kernel_rows("linear", debiased=True)
DEBIASED_RBF = kernel_rows("rbf", debiased=True)
