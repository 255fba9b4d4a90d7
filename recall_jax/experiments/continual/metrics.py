"""Compute metrics of continual learning from a matrix of scores.

R is (1 + T, T + V) float: row 0 is the base, row i the model after task i of T; columns are the
tasks in the order learnt, then V unseen ones. Higher scores are better. A row that was not measured
is NaN, and so are metrics that depend on it, or on tasks that do not exist. The formulas count
tasks from 1, so that R_{j,j} is a task's score right after it was learnt.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np


class Summary(NamedTuple):
    """Hold the mean and the sample standard deviation over runs, None for a single run."""

    mean: float
    deviation: float | None
    runs: int


def final_average(R: np.ndarray, num_tasks: int) -> float:
    """Return the average accuracy, 1/T sum_j R_{T,j} (Lopez-Paz & Ranzato 2017, eq. 2)."""
    return _mean(R[-1, :num_tasks])


def backward_transfer(R: np.ndarray, num_tasks: int) -> float:
    """Return 1/(T-1) sum_{j<T} (R_{T,j} - R_{j,j}) (Lopez-Paz & Ranzato 2017, eq. 3)."""
    tasks = np.arange(num_tasks - 1)
    return _mean(R[-1, tasks] - R[tasks + 1, tasks])


def forward_transfer(R: np.ndarray, num_tasks: int) -> float:
    """Return 1/(T-1) sum_{1<j<=T} (R_{j-1,j} - R_{0,j}) (Lopez-Paz & Ranzato 2017, eq. 4).

    The base takes the place of the paper's model with random weights.
    """
    tasks = np.arange(1, num_tasks)
    return _mean(R[tasks, tasks] - R[0, tasks])


def forgetting(R: np.ndarray, num_tasks: int) -> float:
    """Return 1/(T-1) sum_{j<T} (max_{1<=i<T} R_{i,j} - R_{T,j}) (Chaudhry et al. 2018, eq. 3)."""
    if num_tasks < 2:
        return float("nan")
    earlier = R[1:-1, : num_tasks - 1]
    return _mean(earlier.max(axis=0) - R[-1, : num_tasks - 1])


def unseen_average(R: np.ndarray, num_tasks: int) -> float:
    """Return 1/V sum over the unseen tasks v of R_{T,v}."""
    return _mean(R[-1, num_tasks:])


METRICS: Mapping[str, Callable[[np.ndarray, int], float]] = {
    "final_average": final_average,
    "unseen_average": unseen_average,
    "backward_transfer": backward_transfer,
    "forgetting": forgetting,
    "forward_transfer": forward_transfer,
}


def measure(R: np.ndarray, num_tasks: int) -> dict[str, float | None]:
    """Return all metrics of a matrix R, None if one is not defined."""
    found = {name: metric(R, num_tasks) for name, metric in METRICS.items()}
    return {name: None if np.isnan(value) else value for name, value in found.items()}


def summarise_runs(runs: Sequence[Mapping[str, float | None]]) -> dict[str, Summary | None]:
    """Summarise each metric over the runs (orders and seeds) that have it, None if none has."""
    summary: dict[str, Summary | None] = {}
    for name in METRICS:
        values = [value for run in runs if (value := run[name]) is not None]
        deviation = stdev(values) if len(values) > 1 else None
        summary[name] = Summary(fmean(values), deviation, len(values)) if values else None
    return summary


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
