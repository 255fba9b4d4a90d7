"""Representational similarity analysis (RSA) compares which samples two sides find dissimilar."""

from typing import Literal

import jax
import jax.numpy as jnp

from recall_jax.errors import InputError
from recall_jax.similarity.alignment import center
from recall_jax.similarity.kernels import inner_products, safe_sqrt, squared_distances, unit_norm
from recall_jax.similarity.measure import SidePair, checked

Dissimilarity = Literal["correlation", "euclidean"]
Correlation = Literal["spearman", "pearson"]


@checked(static=("rdm", "compare"))
def rsa(
    X: jax.Array,
    Y: jax.Array,
    rdm: Dissimilarity = "correlation",
    compare: Correlation = "spearman",
) -> jax.Array:
    """Correlation over all sample pairs between the two sides' dissimilarities.

    `rdm`: one minus the Pearson correlation of two rows (a row without variance correlates with
    none), or their Euclidean distance. `compare`: "spearman" (equal values share their mean rank),
    which has no gradient, or "pearson". Range [-1, 1]; 0 if all dissimilarities of a side are
    equal. Needs at least 3 samples. Invariant to isotropic scaling, and with "euclidean" to
    rotation and translation; with "correlation" to the scale and the offset of every row.
    Dissimilarities that differ only by the rounding of the largest are ranked arbitrarily. Source:
    Kriegeskorte et al. 2008. Cost n^2 (E + log n), memory n^2.
    """
    return RSA.evaluate(X, Y, rdm=rdm, compare=compare)


def _side(X: jax.Array, rdm: Dissimilarity, compare: Correlation) -> jax.Array:
    """Return all pairs' dissimilarities or their ranks (n (n - 1) / 2,), centred, of norm one."""
    values = _off_diagonal(_dissimilarities(X, rdm))
    if compare == "spearman":
        values = _ranks(values)
    elif compare != "pearson":
        raise InputError(f"unknown compare {compare!r}: choose spearman or pearson")
    return unit_norm(center(values))


def _dissimilarities(X: jax.Array, rdm: Dissimilarity) -> jax.Array:
    if rdm == "correlation":
        directions = jax.vmap(unit_norm)(center(X.T).T)
        return jnp.maximum(1 - inner_products(directions, directions), 0)
    if rdm == "euclidean":
        return safe_sqrt(squared_distances(unit_norm(center(X)), jnp.arange(len(X))))
    raise InputError(f"unknown rdm {rdm!r}: choose correlation or euclidean")


def _off_diagonal(matrix: jax.Array) -> jax.Array:
    """Return each pair's value once from a symmetric matrix (n, n), one diagonal after another."""
    n = len(matrix)
    pair = jnp.arange(n * (n - 1) // 2)
    row, shift = pair % n, pair // n + 1
    return matrix[row, (row + shift) % n]


def _ranks(values: jax.Array) -> jax.Array:
    """Return ranks from one of non-negative values; equal values share their mean rank.

    The bits of such numbers, read as integers, have the same order, and sort several times faster.
    """
    kind = jnp.int64 if values.dtype.itemsize == 8 else jnp.int32
    keys = jax.lax.bitcast_convert_type(values, kind)
    ordered = jnp.sort(keys)
    first, last = (
        jnp.searchsorted(ordered, keys, side=side, method="scan") for side in ("left", "right")
    )
    nan = jnp.isnan(values)  # NaN has no rank
    return jnp.where(nan, values, 0.5 * (first + last + 1).astype(values.dtype))


def _correlation(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.vdot(x, y, precision="highest")


RSA = SidePair(_side, _correlation, min_samples=3)
