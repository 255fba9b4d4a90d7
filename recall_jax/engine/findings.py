"""Hold the weights of a merge and the quantities behind them, in one form for every engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recall_jax.similarity.compare import (
    Comparison,
    unit_bandwidth,
)
from recall_jax.similarity.diagnostics import weight_rises_with_depth
from recall_jax.similarity.paired import paired_rbf

_paired_rbf = jax.jit(paired_rbf)


@dataclass(frozen=True)
class Findings:
    """Hold the weights of a merge and, if models were compared, the quantities behind them.

    `weights` and `similarity` are (K, U), `sigma` (U,), `adjacent` (U - 2,), `losses` (K,) in nats,
    `loss_curve` (steps + 1,) of the loss minimised; None if a method has none.
    """

    weights: np.ndarray
    similarity: np.ndarray | None = None
    sigma: np.ndarray | None = None
    adjacent: np.ndarray | None = None
    losses: np.ndarray | None = None
    loss_curve: np.ndarray | None = None


def adjacent_similarities(
    model: Sequence[np.ndarray] | np.ndarray, sigma: np.ndarray, comparison: Comparison
) -> np.ndarray | None:
    """Return one model's RBF similarities (U - 2,) of adjacent units, `embed` to the last block.

    `model` holds U arrays (n, E). Each pair is compared with the bandwidth of its first unit: from
    `sigma` (U,), or the unit's median if the comparison takes no sigma. Returns None if a unit has
    no median.
    """
    if not comparison.takes_sigma:
        if len(model[0]) < 2:
            return None
        sigma = np.stack([unit_bandwidth(jnp.asarray(unit)) for unit in model[:-2]])
        if not (sigma > 0).all():
            return None
    pairs = zip(model[:-2], model[1:-1], sigma, strict=False)
    return np.asarray(
        [_paired_rbf(jnp.asarray(unit), jnp.asarray(after), width) for unit, after, width in pairs]
    )


def report_entries(found: Findings) -> dict[str, Any]:
    """Return the report's entries for the findings, as plain numbers."""
    rises = None if found.similarity is None else weight_rises_with_depth(found.weights)
    return {
        "sigma": _plain(found.sigma),
        "similarity": _plain(found.similarity),
        "weights": _plain(found.weights),
        "adjacent": _plain(found.adjacent),
        "losses": _plain(found.losses),
        "loss_curve": _plain(found.loss_curve),
        "weight_rises_with_depth": rises,
    }


def _plain(array: np.ndarray | None) -> Any:
    return None if array is None else np.asarray(array, np.float64).tolist()
