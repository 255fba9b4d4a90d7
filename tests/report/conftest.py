"""A report such as the engine makes, for any number of models and units."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from recall_jax.checkpoint.units import unit_names

Report = dict[str, Any]


def _make_report(K: int = 4, U: int = 8, **changes: Any) -> Report:
    draw = random.Random(1000 * K + U)
    names = [f"runs/model_{index}" for index in range(K)]
    similarity = [[draw.random() for _ in range(U)] for _ in range(K - 1)] + [[1.0] * U]
    totals = [sum(math.exp(row[unit]) for row in similarity) for unit in range(U)]
    weights = [[math.exp(row[unit]) / totals[unit] for unit in range(U)] for row in similarity]
    report: Report = {
        "format": 1,
        "method": "recall",
        "models": names,
        "reference": K - 1,
        "units": list(unit_names(U - 2)),
        "typical_samples": [2, 3, 11],
        "sigma": [1 + draw.random() for _ in range(U)],
        "similarity": similarity,
        "weights": weights,
        "adjacent": [draw.random() for _ in range(U - 2)],
        "typical": {"cluster_sizes": [4, 9, 1], "inertia": 12.5, "silhouette": 0.25},
        "warnings": [],
        "settings": {"temperature": 1.0, "sigma": "median", "samples": {"count": 3, "seed": 0}},
        "timing_s": {"merge": 1.5, "total": 2.0},
        "bytes": {"read": 4096, "written": 1024},
        "peak_memory_bytes": 123456789,
        "versions": {"jax": "0.10.2"},
        "weight_rises_with_depth": True,
    }
    return report | changes


@pytest.fixture(scope="session")
def make_report() -> Callable[..., Report]:
    return _make_report


@pytest.fixture(scope="session")
def constant_report() -> Report:
    """What a linear merge leaves: one weight a model, and nothing measured."""
    return _make_report(
        method="linear",
        reference=None,
        typical_samples=[],
        sigma=None,
        similarity=None,
        weights=[[weight] * 8 for weight in (0.125, 0.25, 0.5, 0.0625)],
        adjacent=None,
        typical=None,
        peak_memory_bytes=None,
        weight_rises_with_depth=None,
    )
