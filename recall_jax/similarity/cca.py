"""Canonical correlation analysis (CCA) measures the angles between the spans of two sides.

The canonical correlations are the singular values of the product of two orthonormal bases, one of
each side's span. A centred side with at least as many features as samples spans the whole space:
its correlations with any other side are one, whatever the values are. Then mean CCA is
uninformative, and so is SVCCA if it keeps enough components; CKA and Procrustes do not saturate in
this way.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from recall_jax.errors import InputError
from recall_jax.similarity.alignment import center as centred
from recall_jax.similarity.factors import Components, components
from recall_jax.similarity.kernels import inner_products, unit_norm
from recall_jax.similarity.measure import SidePair, checked


@checked(static=("center", "squared"))
def mean_cca(X: jax.Array, Y: jax.Array, center: bool = True, squared: bool = False) -> jax.Array:
    """Mean canonical correlation, or mean squared one, over as many as the smaller rank.

    Range [0, 1]; 0 if a side is constant, and 1 if a centred side has n - 1 independent features.
    Invariant to invertible linear maps and translation. Differentiable if n > E and the rank is
    full: at a lower rank the value jumps. Source: Hotelling 1936; Raghu et al. 2017; Kornblith et
    al. 2019. Cost n E min(n, E) per side and n E1 E2 per pair, with SVDs of both.
    """
    return MEAN_CCA.evaluate(X, Y, center=center, squared=squared)


@checked(static=("variance",))
def svcca(X: jax.Array, Y: jax.Array, variance: float = 0.99) -> jax.Array:
    """Mean canonical correlation of each side's leading principal components.

    Each side keeps the fewest components that reach the fraction `variance` of its variance; the
    mean is over the smaller of both numbers. Range [0, 1]; 0 if a side is constant. Invariant to
    rotation, isotropic scaling and translation. The value jumps where a number of components
    changes, and has a gradient elsewhere. Raises InputError for a fraction above 1. Source: Raghu
    et al. 2017, arXiv 1706.05806. Cost as `mean_cca`.
    """
    return SVCCA.evaluate(X, Y, variance=variance)


@checked(static=("weighted_by",))
def pwcca(X: jax.Array, Y: jax.Array, weighted_by: Literal["x", "y"] = "x") -> jax.Array:
    """Projection-weighted CCA: mean canonical correlation, weighted by direction.

    The weight of a direction is the sum over the features x_j of |<h, x_j>|, where h is its
    canonical variate, in the span of X; with `weighted_by="y"`, in the span of Y and over its
    features. Range [0, 1]; 0 if a side is constant. Invariant to translation, to invertible maps of
    the side without weights, and to isotropic scaling and permutation of the one with them. Has no
    gradient where canonical correlations coincide. Source: Morcos et al. 2018, arXiv 1806.05759.
    Cost as `mean_cca`.
    """
    return PWCCA.evaluate(X, Y, weighted_by=weighted_by)


def _mean_correlation(x: Components, y: Components, squared: bool = False) -> jax.Array:
    product = inner_products(x.basis.T, y.basis.T)
    if squared:
        total = jnp.sum(product * product)
    else:
        total = jnp.sum(jnp.linalg.svd(product, compute_uv=False))
    count = jnp.minimum(x.rank, y.rank)
    return jnp.minimum(total / jnp.maximum(count, 1), 1)


def _leading_correlation(x: Components, y: Components, variance: float = 0.99) -> jax.Array:
    if variance > 1:
        raise InputError(f"variance is {variance}: give the fraction to keep, at most 1")
    return _mean_correlation(_leading(x, variance), _leading(y, variance))


def _leading(side: Components, variance: float) -> Components:
    """Set all but the first components, which reach this fraction of the variance, to zero."""
    # The variance of a component and those after it; small numbers are added before large ones.
    rest = jnp.cumsum((side.values * side.values)[::-1])[::-1]
    kept = ~(rest <= (1 - variance) * rest[:1])
    return Components(jnp.where(kept[None, :], side.basis, 0), jnp.where(kept, side.values, 0))


class _Weighing(NamedTuple):
    """Hold the components of a side, and its features (n, E)."""

    components: Components
    features: jax.Array


def _weighing(X: jax.Array) -> _Weighing:
    return _Weighing(components(X), unit_norm(centred(X)))


def _weighted_correlation(x: _Weighing, y: _Weighing, weighted_by: str = "x") -> jax.Array:
    if weighted_by not in ("x", "y"):
        raise InputError(f"unknown weighted_by {weighted_by!r}: choose x or y")
    if weighted_by == "y":
        x, y = y, x
    product = inner_products(x.components.basis.T, y.components.basis.T)
    directions, correlations, _ = jnp.linalg.svd(product, full_matrices=False)
    variates = inner_products(x.components.basis, directions.T)
    weights = jnp.sum(jnp.abs(inner_products(variates.T, x.features.T)), axis=1)
    count = jnp.minimum(x.components.rank, y.components.rank)
    weights = jnp.where(jnp.arange(len(weights), dtype=weights.dtype) < count, weights, 0)
    total = jnp.sum(weights)
    mean = jnp.sum(weights * correlations) / jnp.where(total > 0, total, 1)
    return jnp.minimum(mean, 1)


MEAN_CCA = SidePair(components, _mean_correlation, moments=True)
SVCCA = SidePair(components, _leading_correlation, moments=True)
PWCCA = SidePair(_weighing, _weighted_correlation, moments=True)
