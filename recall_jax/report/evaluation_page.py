"""The page of an evaluation: one table for all models, and each task with all its metrics."""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean
from typing import Any

from recall_jax.evaluation.metrics import OF_TEXTS
from recall_jax.report import wording
from recall_jax.report.page import Table, render_page

_DIGITS = {"perplexity": 2, "bits_per_byte": 3}


def evaluation_summary(record: Mapping[str, Any]) -> Table:
    """A row for each model, a column for each task and metric asked for; texts `value ± error`.

    With several tasks, all of them scored from 0 to 100, the last column is the mean of their first
    metrics. Its standard error is that of a mean of independent tasks.
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
    """The page for a record, as `evaluation.json` holds it."""
    return render_page(
        "evaluation.html.jinja",
        record=record,
        summary=evaluation_summary(record),
        tables=[_table(record, task["task"]) for task in record["tasks"]],
        settings=wording.flat_settings(record["settings"]),
    )


def words(metric: str) -> str:
    """A metric's name as one says it."""
    return (
        metric.replace("squad_", "").replace("_", " ").replace("bleu", "BLEU").replace("f1", "F1")
    )


def mean_of_tasks(estimates: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The mean of tasks' scores; they share no rows, so their errors are independent."""
    errors = [each["standard_error"] for each in estimates]
    known = None if None in errors else sqrt(sum(error**2 for error in errors)) / len(errors)
    return {"value": fmean(each["value"] for each in estimates), "standard_error": known}


def estimate(found: Mapping[str, Any], metric: str = "") -> str:
    """An estimate as `value ± standard error`, in as many digits as the metric is told in."""
    digits = _DIGITS.get(metric, 1)
    if found["standard_error"] is None:
        return f"{found['value']:.{digits}f}"
    return f"{found['value']:.{digits}f} ± {found['standard_error']:.{digits}f}"


def _table(record: Mapping[str, Any], task: str) -> Table:
    """Every metric of one task, with the number of rows behind it."""
    metrics = list(record["results"][0][task])
    counts = record["results"][0][task]
    columns = ["model", *(f"{words(name)} (n = {counts[name]['rows']:,})" for name in metrics)]
    rows = [
        [model["model"], *(estimate(results[task][name], name) for name in metrics)]
        for model, results in zip(record["models"], record["results"], strict=True)
    ]
    return Table(task, columns, rows)
