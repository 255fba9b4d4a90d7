"""How similarity runs over the depth of models, and whether it runs as RECALL's authors saw it.

They report (arXiv 2510.20479) that within one model the similarity of adjacent layers falls sharply
at the first and the last layers, and that between models of one ancestor similarity falls with
depth. They give no test for either; the criteria here are ours. A distance counts the other way
round: where a similarity falls, it rises.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# What is left of the first observation: two ends, and enough between them to have quartiles.
LEAST_STEPS = 5
LEAST_DEPTH = 4
OUTLYING = 1.5  # interquartile ranges beyond a quartile (Tukey 1977)
STRONG = -0.5  # Spearman's correlation of similarity with depth
NOTICEABLE = 1e-3  # a fall smaller than this part of the scale is none: it may be rounding


@dataclass(frozen=True)
class Ends:
    """Adjacent similarity at the first and the last step, and the quartiles of those between.

    `seen`: both ends fall so far out of the quartiles that a box plot would show them as outliers.
    """

    first: float
    last: float
    lower_quartile: float
    upper_quartile: float
    seen: bool


@dataclass(frozen=True)
class Trend:
    """Same-depth similarity at the first and the last depth, and its rank correlation with depth.

    `seen`: Spearman's correlation of similarity with depth is below -0.5.
    """

    first: float
    last: float
    spearman: float
    seen: bool


def falls_at_both_ends(adjacent: np.ndarray, *, distance: bool, scale: float) -> Ends | None:
    """The first observation on the steps (m,) of one model; None for too few, or not finite.

    `scale`: the largest value of the measure on all these models.
    """
    if len(adjacent) < LEAST_STEPS or not np.isfinite(adjacent).all():
        return None
    ends = adjacent[[0, -1]]
    low, high = np.percentile(adjacent[1:-1], [25, 75])
    falls = ends - high if distance else low - ends
    least = max(OUTLYING * (high - low), NOTICEABLE * scale)
    first, last = ends.tolist()
    return Ends(first, last, float(low), float(high), seen=bool((falls > least).all()))


def falls_with_depth(same_depth: np.ndarray, *, distance: bool, scale: float) -> Trend | None:
    """The second observation on the depths (U,) of two models; None for too few, or not finite.

    `scale`: the largest value of the measure on all these models.
    """
    if len(same_depth) < LEAST_DEPTH or not np.isfinite(same_depth).all():
        return None
    correlation = spearman_with_depth(-same_depth if distance else same_depth)
    seen = bool(correlation < STRONG and np.ptp(same_depth) > NOTICEABLE * scale)
    return Trend(float(same_depth[0]), float(same_depth[-1]), correlation, seen)


def spearman_with_depth(values: np.ndarray) -> float:
    """Spearman's correlation of `values` (U,) with their places; 0 where all are equal.

    Equal values share their mean rank.
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        return 0.0
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])


def matching_depths(units: Sequence[str], others: Sequence[str]) -> list[int]:
    """For each of `units` the place in `others` of the same depth.

    The same place where both have the same names, else that nearest in relative depth; a unit that
    stands alone is taken for an output.
    """
    if tuple(units) == tuple(others):
        return list(range(len(units)))
    last, steps = len(others) - 1, len(units) - 1
    return [int(index * last / steps + 0.5) if steps else last for index in range(len(units))]
