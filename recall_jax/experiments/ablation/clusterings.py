"""What a clustering of texts is worth: does it find the tasks, and do its samples cover them?"""

from typing import NamedTuple

import numpy as np

from recall_jax.errors import InputError
from recall_jax.experiments.ablation.domains import squared_distances_between

_DRAWS = 20


class Coverage(NamedTuple):
    """How far texts are from the nearest typical sample, in spreads, each a mean over the units.

    A spread is the root mean squared distance of the texts to their mean: 0 is every text typical,
    1 about as far as the mean would be. `random` is what as many texts drawn at random come to.
    """

    mean: float
    farthest: float
    random: float


def coverage(states: np.ndarray, typical: np.ndarray) -> Coverage:
    """How typical samples (U, m, E) cover n texts (U, n, E); units of one state are left out.

    Raises InputError where no unit has more than one state.
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
    """In nats, and over the mean of the two entropies: 0 tells nothing, 1 everything."""

    nats: float
    normalised: float


def mutual_information(clusters: np.ndarray, domains: np.ndarray) -> MutualInformation:
    """What the cluster (n,) of a text says of its domain (n,), of which there are several."""
    _, rows = np.unique(clusters, return_inverse=True)
    _, columns = np.unique(domains, return_inverse=True)
    joint = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(joint, (rows, columns), 1 / len(rows))
    nats = _entropy(joint.sum(axis=1)) + _entropy(joint.sum(axis=0)) - _entropy(joint.ravel())
    nats = max(nats, 0.0)  # but for rounding it is
    mean = (_entropy(joint.sum(axis=1)) + _entropy(joint.sum(axis=0))) / 2
    return MutualInformation(nats, nats / mean)


def _entropy(shares: np.ndarray) -> float:
    """In nats."""
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())
