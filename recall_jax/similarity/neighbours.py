"""Compare neighbourhoods: whether samples that are close on one side are close on the other.

A sample's neighbours are the k others with the largest inner product with it; among equal ones,
those with the lowest index. If rows have norm one this is the cosine, and a row of zeros has cosine
0 with all others.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recall_jax.errors import InputError
from recall_jax.similarity.kernels import inner_products, unit_norm
from recall_jax.similarity.measure import SampleSum, checked, each_pair, inner_pairs, mean_score


@checked(static=("k", "normalize"))
def mutual_knn(X: jax.Array, Y: jax.Array, k: int = 10, normalize: bool = True) -> jax.Array:
    """Mean fraction of a sample's k nearest neighbours that both sides share.

    Neighbours are by cosine, or with `normalize=False` by inner product of the unscaled rows. Needs
    more than k samples. Range [0, 1]; k / (n - 1) is expected for unrelated sides. Invariant to
    rotation and isotropic scaling, if normalized also to the scale of every row. No gradient.
    Source: Huh et al. 2024, arXiv 2405.07987. Cost n^2 (E1 + E2).
    """
    return MUTUAL_KNN.evaluate(X, Y, k=k, normalize=normalize)


@checked(static=("k", "normalize"))
def jaccard_knn(X: jax.Array, Y: jax.Array, k: int = 10, normalize: bool = True) -> jax.Array:
    """Mean over samples of the number of shared neighbours over that of neighbours on either side.

    Options, range, invariances and cost as `mutual_knn`. Source: Klabunde et al. 2023, arXiv
    2305.06329.
    """
    return JACCARD_KNN.evaluate(X, Y, k=k, normalize=normalize)


@checked(static=("k",))
def second_order_cosine(X: jax.Array, Y: jax.Array, k: int = 10) -> jax.Array:
    """Mean over samples of the cosine between the sides' similarities to its neighbours.

    A sample's neighbours are the k nearest on either side; its similarities to them are cosines
    (the ReSi library uses one minus the cosine). Needs more than k samples. Range [-1, 1]; a sample
    orthogonal to all its neighbours counts 0. Invariant to rotation and to the scale of every row.
    Source: Hamilton et al. 2016, arXiv 1606.02821. Cost n^2 (E1 + E2).
    """
    return SECOND_ORDER_COSINE.evaluate(X, Y, k=k)


def nearest(values: jax.Array, index: jax.Array, k: int) -> jax.Array:
    """Mark the k largest `values` (b, n) of each of the samples `index` (b,) with ones in (b, n).

    A sample's value with itself is left out; of equal values those of the lowest index come first.
    Raises InputError unless k is a whole number below n.
    """
    rows, n = values.shape
    if not (k == int(k) and k < n):
        raise InputError(f"k is {k}: give a whole number below the number of samples, {n}")
    is_self = index[:, None] == jnp.arange(n)[None, :]
    _, found = jax.lax.top_k(jnp.where(is_self, -jnp.inf, values), int(k))
    return jnp.zeros_like(values).at[jnp.arange(rows)[:, None], found].set(1)


def _points(X: jax.Array, block_size: int, normalize: bool) -> jax.Array:
    return jax.vmap(unit_norm)(X) if normalize else unit_norm(X)


def _neighbours(X: jax.Array, index: jax.Array, points: jax.Array, k: int) -> jax.Array:
    return nearest(inner_products(points[index], points), index, k)


def _share(xy: jax.Array, xx: jax.Array, yy: jax.Array, num_samples: int) -> jax.Array:
    return xy / xx  # xx is the sum of all k


def _jaccard(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return Jaccard sums (A, B) from neighbours (A, b, n) and (B, b, n)."""
    both = jnp.einsum("abm,cbm->bac", x, y, precision="highest")
    number = jnp.sum(x[0, 0])  # k, on either side
    return jnp.sum(both / (2 * number - both), axis=0)


class _Similarities(NamedTuple):
    """Hold cosines (b, n) with all samples, and ones (b, n) for the neighbours."""

    cosines: jax.Array
    near: jax.Array


def _similarities(X: jax.Array, index: jax.Array, points: jax.Array, k: int) -> _Similarities:
    cosines = inner_products(points[index], points)
    return _Similarities(cosines, nearest(cosines, index, k))


def _second_order(x: _Similarities, y: _Similarities) -> jax.Array:
    """Return the sum () of the cosines of these rows."""
    either = jnp.maximum(x.near, y.near)
    directions = [jax.vmap(unit_norm)(side.cosines * either) for side in (x, y)]
    return jnp.vdot(*directions, precision="highest")


MUTUAL_KNN = SampleSum(_points, _neighbours, inner_pairs, _share)
JACCARD_KNN = SampleSum(_points, _neighbours, _jaccard, mean_score)
SECOND_ORDER_COSINE = SampleSum(
    partial(_points, normalize=True), _similarities, each_pair(_second_order), mean_score
)
