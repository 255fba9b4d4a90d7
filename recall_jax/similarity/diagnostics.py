"""Detect signs in the similarities that a merge may be uninformed, or harmful."""

from collections.abc import Sequence

import numpy as np

NEGLIGIBLE = 1e-6
INDISTINGUISHABLE = 1e-4
FAR_APART = 0.1


def similarity_warnings(
    similarity: np.ndarray | None, units: Sequence[str], reference: int | None
) -> list[str]:
    """Return warnings about S (K, U); `reference` is a model's index, or None for pairwise."""
    if similarity is None:
        return []
    num_models = len(similarity)
    others = np.delete(similarity, reference, axis=0) if reference is not None else similarity
    vanished = [unit for unit, column in zip(units, others.T, strict=True) if _vanished(column)]
    alike = [
        unit
        for unit, column in zip(units, similarity.T, strict=True)
        if np.ptp(column) <= INDISTINGUISHABLE
    ]
    warnings = []
    if vanished:
        warnings.append(
            f"degenerate: no model is similar to the reference (every S below {NEGLIGIBLE:g}) in "
            f"{_listed(vanished)}; sigma may be far below the representations' scale"
        )
    if alike:
        warnings.append(
            f"degenerate: all models look the same (every S within {INDISTINGUISHABLE:g}) in "
            f"{_listed(alike)}, so their weights there are equal: 1/{num_models} each"
        )
    if (far := np.mean(others, axis=0) < FAR_APART).sum() > len(units) / 2:
        warnings.append(
            f"models are far apart: their mean similarity is below {FAR_APART} in {far.sum()} of "
            f"{len(units)} units; merging may hurt"
        )
    return warnings


def weight_rises_with_depth(weights: np.ndarray) -> bool:
    """Return whether the newest model weighs more in the last third of layers than in the first.

    `weights` is (K, U); embed and head are left out. This is the hierarchy that the paper reports:
    shallow layers shared, deep layers specialised.
    """
    layers = weights[-1, 1:-1]
    if len(layers) == 0:
        return False
    third = max(1, len(layers) // 3)
    return bool(np.mean(layers[-third:]) - np.mean(layers[:third]) > INDISTINGUISHABLE)


def _vanished(column: np.ndarray) -> bool:
    return bool(np.all(column < NEGLIGIBLE))


def _listed(units: Sequence[str], most: int = 6) -> str:
    more = f" and {len(units) - most} more" if len(units) > most else ""
    return ", ".join(units[:most]) + more
