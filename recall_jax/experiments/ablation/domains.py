"""Measure how well the states of a unit separate the domains of texts.

A unit is general if texts of different domains are as similar as texts of one, and if a text's
neighbours do not predict its domain.
"""

from typing import NamedTuple

import numpy as np

NEIGHBOURS = 5


class DomainSimilarity(NamedTuple):
    """Hold the mean similarity of pairs of texts within and across domains.

    Both are NaN if more than half of the pairs have the same states.
    """

    within: float
    across: float


def domain_similarity(states: np.ndarray, domains: np.ndarray) -> DomainSimilarity:
    """Return the RBF similarity of pairs of states (n, E), within and across domains (n,).

    It is RECALL's exp(-d^2 / (2 sigma^2)), with sigma^2 half the median d^2 of all pairs.
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
    """Return how accurately the k nearest states (n, E) predict a text's domain (n,), in [0, 1].

    This is leave-one-out k-nearest-neighbour classification by Euclidean distance; the lowest
    domain wins a tie of votes.
    """
    squared = squared_distances_between(states, states)
    np.fill_diagonal(squared, np.inf)
    nearest = np.argsort(squared, axis=1, kind="stable")[:, :k]
    votes = (domains[nearest][:, :, None] == np.unique(domains)).sum(axis=1)  # (n, domains)
    return float(np.mean(np.unique(domains)[votes.argmax(axis=1)] == domains))


def squared_distances_between(states: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return squared distances (n, m) of states (n, E) to others (m, E), float64."""
    centre = states.mean(axis=0, dtype=np.float64)
    left, right = states - centre, others - centre
    norms = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)
    return np.maximum(norms - 2 * left @ right.T, 0)
