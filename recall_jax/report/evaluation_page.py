"""Render the page of an evaluation: a table of all models, and one of each task's metrics."""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean
from typing import Any

from recall_jax.evaluation.metrics import OF_TEXTS
from recall_jax.report import wording
from recall_jax.report.page import Table, render_page

_DIGITS = {"perplexity": 2, "bits_per_byte": 3}


def evaluation_summary(record: Mapping[str, Any]) -> Table:
    """Return a table with a row for each model and a column for each task's main metrics.

    Cells are texts `value ± error`. If there are several tasks and all are scored from 0 to 100,
    the last column is the mean of their first metrics, with the standard error of a mean of
    independent tasks.
    """
    columns = [(task["task"], metric) for task in record["tasks"] for metric in task["metrics"]]
    titles = ["model", *(f"{task}: {words(metric)}" for task, metric in columns)]
    firsts = [task["metrics"][0] for task in record["tasks"]]
    has_mean = len(firsts) > 1 and not set(firsts) & set(OF_TEXTS)
    rows = []
    for model, results in zip(record["models"], record["results"], strict=True):
        cells = [estimate(results[task][metric], metric) for task, metric in columns]
        if has_mean:
            first = [
                results[task["task"]][name]
                for task, name in zip(record["tasks"], firsts, strict=True)
            ]
            cells.append(estimate(mean_of_tasks(first)))
        rows.append([model["model"], *cells])
    if has_mean:
        titles.append("mean")
    return Table("Results", titles, rows)


def render_evaluation(record: Mapping[str, Any]) -> str:
    """Render the page for a record, in the form of `evaluation.json`."""
    return render_page(
        "evaluation.html.jinja",
        record=record,
        summary=evaluation_summary(record),
        tables=[_table(record, task["task"]) for task in record["tasks"]],
        settings=wording.flat_settings(record["settings"]),
    )


def words(metric: str) -> str:
    """Return a metric's name in words."""
    return (
        metric.replace("squad_", "").replace("_", " ").replace("bleu", "BLEU").replace("f1", "F1")
    )


def mean_of_tasks(estimates: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the mean of tasks' scores; they share no rows, so their errors are independent."""
    errors = [each["standard_error"] for each in estimates]
    error = None if None in errors else sqrt(sum(error**2 for error in errors)) / len(errors)
    return {"value": fmean(each["value"] for each in estimates), "standard_error": error}


def estimate(found: Mapping[str, Any], metric: str = "") -> str:
    """Format an estimate as `value ± standard error`, with the number of digits for the metric."""
    digits = _DIGITS.get(metric, 1)
    if found["standard_error"] is None:
        return f"{found['value']:.{digits}f}"
    return f"{found['value']:.{digits}f} ± {found['standard_error']:.{digits}f}"


def _table(record: Mapping[str, Any], task: str) -> Table:
    """Return a table of all metrics of one task, with their numbers of rows."""
    metrics = list(record["results"][0][task])
    counts = record["results"][0][task]
    columns = ["model", *(f"{words(name)} (n = {counts[name]['rows']:,})" for name in metrics)]
    rows = [
        [model["model"], *(estimate(results[task][name], name) for name in metrics)]
        for model, results in zip(record["models"], record["results"], strict=True)
    ]
    return Table(task, columns, rows)
