"""Measure how well a clustering of texts separates their domains, and how it covers the texts."""

from typing import NamedTuple

import numpy as np

from recall_jax.errors import InputError
from recall_jax.experiments.ablation.domains import squared_distances_between

_DRAWS = 20


class Coverage(NamedTuple):
    """Measure distances of texts to the nearest typical sample, in spreads, averaged over units.

    A spread is the root mean squared distance of the texts to their mean: the distance is 0 if
    every text is typical, and about 1 if samples are no nearer than the mean. `random` is the mean
    distance to as many texts drawn at random.
    """

    mean: float
    farthest: float
    random: float


def coverage(states: np.ndarray, typical: np.ndarray) -> Coverage:
    """Measure how typical samples (U, m, E) cover n texts (U, n, E).

    Units in which all texts have the same state are left out. Raises InputError if all units are.
    """
    spreads = np.sqrt(states.var(axis=1, dtype=np.float64).sum(axis=1))  # (U,)
    units = np.flatnonzero(spreads > 0).tolist()
    if not units:
        raise InputError("every text of the domains has the same states: give other rows")

    def nearest(unit: int, samples: np.ndarray) -> np.ndarray:
        squared = squared_distances_between(states[unit], samples)
        return np.sqrt(squared.min(axis=1)) / spreads[unit]

    found = np.stack([nearest(unit, typical[unit]) for unit in units])
    generator = np.random.default_rng(0)
    count = min(typical.shape[1], states.shape[1])
    drawn = [generator.choice(states.shape[1], count, replace=False) for _ in range(_DRAWS)]
    at_random = [nearest(unit, states[unit, rows]).mean() for rows in drawn for unit in units]
    return Coverage(float(found.mean()), float(found.max(axis=1).mean()), float(np.mean(at_random)))


class MutualInformation(NamedTuple):
    """Hold mutual information in nats, and divided by the mean of both entropies, in [0, 1]."""

    nats: float
    normalised: float


def mutual_information(clusters: np.ndarray, domains: np.ndarray) -> MutualInformation:
    """Return the mutual information of texts' clusters (n,) and domains (n,).

    There must be at least two domains.
    """
    _, rows = np.unique(clusters, return_inverse=True)
    _, columns = np.unique(domains, return_inverse=True)
    joint = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(joint, (rows, columns), 1 / len(rows))
    nats = _entropy(joint.sum(axis=1)) + _entropy(joint.sum(axis=0)) - _entropy(joint.ravel())
    nats = max(nats, 0.0)  # rounding may make it negative
    mean = (_entropy(joint.sum(axis=1)) + _entropy(joint.sum(axis=0))) / 2
    return MutualInformation(nats, nats / mean)


def _entropy(shares: np.ndarray) -> float:
    """Return the entropy in nats."""
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())
