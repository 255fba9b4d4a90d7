"""Describe how similarity changes with depth, and test the two observations of RECALL's authors.

They report (arXiv 2510.20479) that within one model the similarity of adjacent layers falls sharply
at the first and the last layers, and that between models of one ancestor similarity falls with
depth. They give no test for either; the criteria here are ours. A distance has the opposite sign:
it rises where a similarity falls.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The first observation needs two ends, and enough steps between them for quartiles.
LEAST_STEPS = 5
LEAST_DEPTH = 4
OUTLYING = 1.5  # interquartile ranges beyond a quartile (Tukey 1977)
STRONG = -0.5  # Spearman's correlation of similarity with depth
NOTICEABLE = 1e-3  # a fall below this fraction of the scale may be rounding


@dataclass(frozen=True)
class Ends:
    """Hold adjacent similarity at the first and the last step, and the quartiles of those between.

    `seen` says that both ends fall so far out of the quartiles that a box plot would show outliers.
    """

    first: float
    last: float
    lower_quartile: float
    upper_quartile: float
    seen: bool


@dataclass(frozen=True)
class Trend:
    """Hold same-depth similarity at the first and last depth, and its rank correlation with depth.

    `seen` says that Spearman's correlation of similarity with depth is below -0.5.
    """

    first: float
    last: float
    spearman: float
    seen: bool


def falls_at_both_ends(adjacent: np.ndarray, *, distance: bool, scale: float) -> Ends | None:
    """Test the first observation on the steps (m,) of one model; None if too few, or not finite.

    `scale` is the largest value of the measure between all these models.
    """
    if len(adjacent) < LEAST_STEPS or not np.isfinite(adjacent).all():
        return None
    ends = adjacent[[0, -1]]
    low, high = np.percentile(adjacent[1:-1], [25, 75])
    falls = ends - high if distance else low - ends
    minimum = max(OUTLYING * (high - low), NOTICEABLE * scale)
    first, last = ends.tolist()
    return Ends(first, last, float(low), float(high), seen=bool((falls > minimum).all()))


def falls_with_depth(same_depth: np.ndarray, *, distance: bool, scale: float) -> Trend | None:
    """Test the second observation on the depths (U,) of two models; None if too few, or not finite.

    `scale` is the largest value of the measure between all these models.
    """
    if len(same_depth) < LEAST_DEPTH or not np.isfinite(same_depth).all():
        return None
    correlation = spearman_with_depth(-same_depth if distance else same_depth)
    seen = bool(correlation < STRONG and np.ptp(same_depth) > NOTICEABLE * scale)
    return Trend(float(same_depth[0]), float(same_depth[-1]), correlation, seen)


def spearman_with_depth(values: np.ndarray) -> float:
    """Return Spearman's correlation of `values` (U,) with their index; 0 if all are equal.

    Equal values share their mean rank.
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        return 0.0
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])


def matching_depths(units: Sequence[str], others: Sequence[str]) -> list[int]:
    """Return for each of `units` the index in `others` of the same depth.

    This is the same index if both have the same names, else the nearest in relative depth; a single
    unit counts as an output.
    """
    if tuple(units) == tuple(others):
        return list(range(len(units)))
    last, steps = len(others) - 1, len(units) - 1
    return [int(index * last / steps + 0.5) if steps else last for index in range(len(units))]
