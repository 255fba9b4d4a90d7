"""Scores of merged models on the same rows: means over tasks, and differences, with their errors.

A task counts by its first metric, from 0 to 100 and more is better, or if it is of texts by its
bits per byte, of which less is better.
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
"""What each row (n,) gives to a metric that is their mean; None of a metric of all rows at once."""


def counted_metric(task: Task) -> str:
    """The metric by which a task counts."""
    first = headline(task)[0]
    return BITS_PER_BYTE if first in OF_TEXTS else first


def check_comparable(tasks: Sequence[Task]) -> bool:
    """Whether less is better. Raises InputError where tasks of texts stand beside others."""
    of_texts = [task.task for task in tasks if counted_metric(task) == BITS_PER_BYTE]
    if of_texts and len(of_texts) < len(tasks):
        raise InputError(
            f"tasks: {of_texts[0]} is scored in bits per byte and others from 0 to 100, which have "
            "no mean: take tasks of one kind"
        )
    return bool(of_texts)


def row_shares(metric: str, predictions: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """The rows' shares in a metric, from what a model answered to each."""
    if metric == BITS_PER_BYTE:
        mean_bytes = fmean(row["bytes"] for row in predictions)
        return [row["nats"] / np.log(2) / mean_bytes for row in predictions]
    if any(metric not in row for row in predictions):
        return None
    return [100 * row[metric] for row in predictions]


def mean_difference(mine: Sequence[Shares], others: Sequence[Shares]) -> dict[str, float] | None:
    """How much higher the mean score of the tasks is than another's, on the same rows.

    The standard error is of the differences row by row, so rows that are hard for both do not
    count. None where a metric has no shares, or a task one row.
    """
    values, variances = [], []
    for one, other in zip(mine, others, strict=True):
        if one is None or other is None or len(one) < 2:
            return None
        differences = np.subtract(one, other)
        values.append(float(differences.mean()))
        variances.append(float(differences.var(ddof=1)) / len(differences))
    return {"value": fmean(values), "standard_error": sqrt(sum(variances)) / len(values)}
