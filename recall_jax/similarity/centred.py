"""Compute the Hilbert-Schmidt independence criterion (HSIC) from centred kernels of the samples.

HSIC (Gretton et al. 2005) is the inner product of two kernel matrices (n, n), each centred; its
cosine form is CKA, and with distances as kernels it is the distance covariance. The debiased form
is the unbiased estimator (Song et al. 2012), which is the inner product of U-centred matrices
(Székely and Rizzo 2014): without the diagonal, every row sums to zero.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from recall_jax.errors import InputError
from recall_jax.similarity.alignment import center
from recall_jax.similarity.blocks import map_blocks
from recall_jax.similarity.kernels import (
    inner_products,
    median_squared_distance,
    safe_sqrt,
    squared_distances,
    unit_norm,
)
from recall_jax.similarity.measure import SampleSum, checked, cosine_score, inner_pairs

KernelName = Literal["linear", "rbf", "distance"]


class CentredKernel(NamedTuple):
    """Hold what the rows of a centred kernel matrix need from all samples.

    `points` (n, E) are centred; `squared_sigma` () is the squared bandwidth, one for kernels
    without it. Centring subtracts `offsets` (n,) by row and by column, and adds `mean` ().
    """

    points: jax.Array
    squared_sigma: jax.Array
    offsets: jax.Array
    mean: jax.Array


def centred_kernel(
    X: jax.Array,
    block_size: int,
    kernel: KernelName,
    threshold: float | jax.Array = 0.5,
    debiased: bool = False,
    scaled: bool = True,
) -> CentredKernel:
    """Centre a kernel of X (n, E), scaled to norm one unless the kernel is linear and not `scaled`.

    The bandwidth of "rbf" is `threshold` times the root of the median squared distance. Raises
    InputError if `debiased` and n < 4.
    """
    n = len(X)
    points = unit_norm(center(X)) if scaled or kernel != "linear" else center(X)
    squared_sigma = jnp.ones((), X.dtype)
    if kernel == "rbf":
        median = median_squared_distance(points, block_size, include_self=True)
        squared_sigma = jnp.asarray(threshold, X.dtype) ** 2 * median
    if debiased and n < 4:
        raise InputError(f"{n} samples: a debiased measure takes at least 4")

    def sums(index: jax.Array) -> jax.Array:
        return jnp.sum(_values(points, index, squared_sigma, kernel), axis=1)

    # The rows of a linear kernel of centred points sum to zero.
    over = jnp.zeros(n, X.dtype) if kernel == "linear" else map_blocks(sums, n, block_size)
    if not debiased:
        return CentredKernel(points, squared_sigma, over / n, jnp.sum(over) / n**2)
    if kernel == "linear":  # the other kernels' diagonals are zero
        over = over - jnp.sum(points * points, axis=1)
    return CentredKernel(points, squared_sigma, over / (n - 2), jnp.sum(over) / ((n - 1) * (n - 2)))


def centred_rows(
    X: jax.Array,
    index: jax.Array,
    statistics: CentredKernel,
    kernel: KernelName,
    debiased: bool = False,
) -> jax.Array:
    """Return rows (b, n) of the centred kernel matrix, for the samples `index` (b,)."""
    points, squared_sigma, offsets, mean = statistics
    values = _values(points, index, squared_sigma, kernel)
    centred = values - offsets[index][:, None] - offsets[None, :] + mean
    if not debiased:
        return centred
    return jnp.where(index[:, None] == jnp.arange(len(points))[None, :], 0, centred)


def kernel_rows(kernel: KernelName, debiased: bool = False) -> SampleSum:
    """Return the cosine of two centred kernel matrices as a sum over samples."""
    return SampleSum(
        partial(centred_kernel, kernel=kernel, debiased=debiased),
        partial(centred_rows, kernel=kernel, debiased=debiased),
        inner_pairs,
        cosine_score,
        min_samples=4 if debiased else 2,
    )


@checked(static=("kernel", "debiased"))
def hsic(
    X: jax.Array,
    Y: jax.Array,
    kernel: Literal["linear", "rbf"] = "linear",
    debiased: bool = False,
    threshold: float = 0.5,
) -> jax.Array:
    """HSIC: tr(K H L H) / (n - 1)^2 of the kernel matrices K and L, with H = I - 1/n.

    `kernel` is "linear" or "rbf" (bandwidth as in `rbf_cka`). `debiased` uses the unbiased
    estimator, whose expectation is zero for independent X and Y. Range [0, inf), debiased also
    below zero. Invariant to rotation and translation; with "linear" it grows with the square of
    either side's scale, and leaves the range of the dtype where ||X||^2 ||Y||^2 does. Source:
    Gretton et al. 2005; Song et al. 2012. Cost n^2 (E1 + E2).
    """
    return HSIC.evaluate(X, Y, kernel=kernel, debiased=debiased, threshold=threshold)


def _named_kernel(
    X: jax.Array, block_size: int, kernel: KernelName, threshold: float, debiased: bool
) -> CentredKernel:
    if kernel not in ("linear", "rbf"):
        raise InputError(f"unknown kernel {kernel!r}: choose linear or rbf")
    return centred_kernel(X, block_size, kernel, threshold, debiased, scaled=False)


def _score(
    xy: jax.Array, xx: jax.Array, yy: jax.Array, num_samples: int, debiased: bool
) -> jax.Array:
    return xy / (num_samples * (num_samples - 3) if debiased else (num_samples - 1) ** 2)


HSIC = SampleSum(_named_kernel, centred_rows, inner_pairs, _score)


def _values(
    points: jax.Array, index: jax.Array, squared_sigma: jax.Array, kernel: KernelName
) -> jax.Array:
    """Return kernel values (b, n) of samples `index` (b,) with all samples, minus one for RBF.

    Centring removes any constant, and near one there are few digits.
    """
    if kernel == "linear":
        return inner_products(points[index], points)
    squared = squared_distances(points, index)
    if kernel == "distance":
        return safe_sqrt(squared)
    none = squared_sigma <= 0
    exponent = squared / (2 * jnp.where(none, 1, squared_sigma))
    # With zero bandwidth, only equal samples are similar.
    return jnp.where(none, -(squared > 0).astype(points.dtype), jnp.expm1(-exponent))
