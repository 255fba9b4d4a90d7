"""Distance correlation measures whether the distances between samples vary together."""

from dataclasses import replace

import jax

from recall_jax.similarity.centred import kernel_rows
from recall_jax.similarity.kernels import safe_sqrt
from recall_jax.similarity.measure import checked, cosine_score


@checked(static=("squared",))
def distance_correlation(X: jax.Array, Y: jax.Array, squared: bool = False) -> jax.Array:
    """Root of the cosine between the sides' double-centred Euclidean distance matrices.

    `squared` omits the root. Range [0, 1]; 0 if a side is constant; in the limit of many samples, 0
    only for independent sides. Invariant to rotation, isotropic scaling and translation. Source:
    Székely et al. 2007, definition 3. Cost n^2 (E1 + E2).
    """
    return DISTANCE_CORRELATION.evaluate(X, Y, squared=squared)


def _score(
    xy: jax.Array, xx: jax.Array, yy: jax.Array, num_samples: int, squared: bool
) -> jax.Array:
    cosine = cosine_score(xy, xx, yy, num_samples)
    return cosine if squared else safe_sqrt(cosine)


DISTANCE_CORRELATION = replace(kernel_rows("distance"), score=_score)
