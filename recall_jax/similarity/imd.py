"""Intrinsic multi-scale distance (IMD) compares the shapes of the manifolds of two sides' samples.

It compares how heat spreads on the graph of nearest neighbours, at all times at once; the samples
need not correspond.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from recall_jax.similarity.alignment import center
from recall_jax.similarity.kernels import squared_distances, unit_norm
from recall_jax.similarity.measure import SidePair, checked
from recall_jax.similarity.neighbours import nearest

# The grid of the authors' code.
_TIMES = np.logspace(-1, 1, 256)
LARGEST = math.exp(-4)


@checked(static=("k",))
def imd(X: jax.Array, Y: jax.Array, k: int = 5) -> jax.Array:
    """Maximum over t in [0.1, 10] of exp(-2 (t + 1/t)) |h_X(t) - h_Y(t)|.

    h(t) is the mean of exp(-t lambda) over the eigenvalues of the normalised Laplacian of the graph
    that joins each sample to its k nearest by Euclidean distance. Eigenvalues are exact; the
    authors' code estimates traces, and multiplies by 10^6. Range [0, exp(-4)]; 0 for equal sides.
    Needs more than k samples. Invariant to rotation, isotropic scaling, translation, and the order
    of either side's samples. No gradient. Source: Tsitsulin et al. 2020, arXiv 1905.11141. Cost
    n^3, memory n^2.
    """
    return IMD.evaluate(X, Y, k=k)


def _heat(X: jax.Array, k: int) -> jax.Array:
    """Return the heat kernel trace over n at each of the times: (256,)."""
    index = jnp.arange(len(X))
    near = nearest(-squared_distances(unit_norm(center(X)), index), index, k)
    joined = jnp.maximum(near, near.T)
    scale = jax.lax.rsqrt(jnp.sum(joined, axis=1))  # every sample has k neighbours or more
    spread = joined * scale[:, None] * scale[None, :]
    eigenvalues = 1 - jnp.linalg.eigvalsh(spread, symmetrize_input=False)
    times = jnp.asarray(_TIMES, X.dtype)
    return jnp.mean(jnp.exp(-times[:, None] * eigenvalues[None, :]), axis=1)


def _distance(x: jax.Array, y: jax.Array) -> jax.Array:
    weight = jnp.asarray(np.exp(-2 * (_TIMES + 1 / _TIMES)), x.dtype)
    return jnp.max(weight * jnp.abs(x - y))


IMD = SidePair(_heat, _distance)
