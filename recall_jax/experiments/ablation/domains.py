"""How much one unit's states tell of the domain that a text is from.

A unit is general where texts of different domains are as alike as those of one, and where a text's
neighbours do not give its domain away.
"""

from typing import NamedTuple

import numpy as np

NEIGHBOURS = 5


class DomainSimilarity(NamedTuple):
    """Mean similarity of two texts of one domain, and of two; NaN where most states coincide."""

    within: float
    across: float


def domain_similarity(states: np.ndarray, domains: np.ndarray) -> DomainSimilarity:
    """RBF similarity of the pairs of states (n, E) within and across the domains (n,).

    exp(-d^2 / (2 sigma^2)) as RECALL's, with sigma^2 half the median d^2 of all pairs.
    """
    squared = squared_distances_between(states, states)
    pairs = np.triu_indices(len(states), k=1)
    median = np.median(squared[pairs])
    if median <= 0:
        return DomainSimilarity(np.nan, np.nan)
    similarity = np.exp(-squared[pairs] / median)
    same = domains[pairs[0]] == domains[pairs[1]]
    return DomainSimilarity(float(similarity[same].mean()), float(similarity[~same].mean()))


def neighbour_accuracy(states: np.ndarray, domains: np.ndarray, k: int = NEIGHBOURS) -> float:
    """Share of the texts whose domain (n,) the k nearest others tell, by their states (n, E).

    Leave-one-out: Euclidean distance, each neighbour one vote, the lowest domain of equal ones.
    """
    squared = squared_distances_between(states, states)
    np.fill_diagonal(squared, np.inf)
    nearest = np.argsort(squared, axis=1, kind="stable")[:, :k]
    votes = (domains[nearest][:, :, None] == np.unique(domains)).sum(axis=1)  # (n, domains)
    return float(np.mean(np.unique(domains)[votes.argmax(axis=1)] == domains))


def squared_distances_between(states: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n, m) squared distances of states (n, E) to others (m, E), float64; rounding aside."""
    centre = states.mean(axis=0, dtype=np.float64)
    left, right = states - centre, others - centre
    norms = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)
    return np.maximum(norms - 2 * left @ right.T, 0)
