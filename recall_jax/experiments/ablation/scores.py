"""Compare scores of merged models on the same rows: means over tasks, differences and errors.

A task is scored by its first metric, from 0 to 100 (higher is better), or if it is of texts by its
bits per byte (lower is better).
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean
from typing import Any

import numpy as np

from recall_jax.errors import InputError
from recall_jax.evaluation.metrics import OF_TEXTS
from recall_jax.evaluation.scoring import headline
from recall_jax.evaluation.task import Task

BITS_PER_BYTE = OF_TEXTS[1]
Shares = Sequence[float] | None
"""Each row's contribution (n,) to a metric that is their mean; None for a metric of the corpus."""


def counted_metric(task: Task) -> str:
    """Return the metric by which a task is scored."""
    first = headline(task)[0]
    return BITS_PER_BYTE if first in OF_TEXTS else first


def check_comparable(tasks: Sequence[Task]) -> bool:
    """Return whether lower is better; InputError if only some of the tasks are of texts."""
    of_texts = [task.task for task in tasks if counted_metric(task) == BITS_PER_BYTE]
    if of_texts and len(of_texts) < len(tasks):
        raise InputError(
            f"tasks: {of_texts[0]} is scored in bits per byte and others from 0 to 100, which have "
            "no mean: take tasks of one kind"
        )
    return bool(of_texts)


def row_shares(metric: str, predictions: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Return the rows' shares of a metric, from a model's answers."""
    if metric == BITS_PER_BYTE:
        mean_bytes = fmean(row["bytes"] for row in predictions)
        return [row["nats"] / np.log(2) / mean_bytes for row in predictions]
    if any(metric not in row for row in predictions):
        return None
    return [100 * row[metric] for row in predictions]


def mean_difference(first: Sequence[Shares], second: Sequence[Shares]) -> dict[str, float] | None:
    """Return the first model's mean score over tasks minus the second's, on the same rows.

    The standard error is that of the differences row by row, so that rows that are hard for both do
    not contribute. Returns None if a metric has no shares, or a task only one row.
    """
    values, variances = [], []
    for one, other in zip(first, second, strict=True):
        if one is None or other is None or len(one) < 2:
            return None
        differences = np.subtract(one, other)
        values.append(float(differences.mean()))
        variances.append(float(differences.var(ddof=1)) / len(differences))
    return {"value": fmean(values), "standard_error": sqrt(sum(variances)) / len(values)}
