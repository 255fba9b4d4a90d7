"""Make the record of all runs: every matrix, its metrics, and summaries over orders and seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recall_jax.evaluation.metrics import OF_TEXTS
from recall_jax.evaluation.scoring import headline
from recall_jax.evaluation.task import Task
from recall_jax.experiments.continual.journal import ContinualJournal, ModelResults
from recall_jax.experiments.continual.lineage import MergedModel, Model, Tuned, ancestry, definition
from recall_jax.experiments.continual.metrics import Summary, measure, summarise_runs
from recall_jax.experiments.continual.plan import Run
from recall_jax.experiments.continual.recipe import Protocol
from recall_jax.parallel.machine import device, versions

BASE = "base"  # name of its row in tables
BITS = "bits_per_byte"
MATRICES, MODELS = "matrices", "models"


def score_of(task: Task, results: ModelResults) -> float:
    """Return a task's first metric, or for texts minus the bits per byte; higher is better."""
    metrics = headline(task)
    name, sign = (BITS, -1) if metrics == OF_TEXTS else (metrics[0], 1)
    return sign * float(results[task.task][name]["value"])


def scores(columns: Mapping[str, Task], order: Sequence[str], results: ModelResults) -> list[float]:
    """Return a row of R: scores of the tasks of the order, then of all others."""
    return [score_of(columns[name], results) for name in in_order(columns, order)]


def in_order(columns: Mapping[str, Task], order: Sequence[str]) -> list[str]:
    """Return the names of the columns: those of the order, then all others."""
    return [*order, *(name for name in columns if name not in order)]


def make_continual_record(
    protocol: Protocol,
    runs: Sequence[Run],
    columns: Mapping[str, Task],
    kept: Mapping[str, Model],
    journal: ContinualJournal,
) -> dict[str, Any]:
    """Return the content of `continual.json`; `kept` are the final models kept, by run name."""
    run_records = [_run(run, columns, kept.get(run.name), journal) for run in runs]
    models = ancestry(model for run in runs for model in (run.base, *run.stages) if model)
    return {
        "format": 1,
        "columns": [
            {
                "name": name,
                "task": task.task,
                "metric": "minus bits per byte"
                if headline(task) == OF_TEXTS
                else headline(task)[0].replace("_", " "),
                "learnt": name in [task.name for task in protocol.tasks],
            }
            for name, task in columns.items()
        ],
        "orders": [list(order) for order in protocol.orders],
        "seeds": list(protocol.seeds),
        "base": {
            "summary": _summary(
                [
                    _base_metrics(run)
                    for run in {(r["order"], r["seed"]): r for r in run_records}.values()
                ]
            )
        },
        "strategies": {
            name: {
                "about": strategy.about,
                "joint": strategy.joint,
                "summary": _summary([r["metrics"] for r in run_records if r["strategy"] == name]),
            }
            for name, strategy in protocol.strategies.items()
        },
        "runs": run_records,
        "models": {
            name: {**definition(model), "results": journal.results.get(name)}
            for name, model in models.items()
        },
        "warnings": journal.warning_lines(),
        "recipe": protocol.model_dump(mode="json", by_alias=True, exclude_none=True),
        "timing_s": {
            what: sum(journal.seconds.get(n, 0.0) for n, m in models.items() if isinstance(m, kind))
            for what, kind in (("fine-tuning", Tuned), ("merging", MergedModel))
        },
        "versions": versions(),
        "device": device(),
    }


def _run(
    run: Run, columns: Mapping[str, Task], kept: Model | None, journal: ContinualJournal
) -> dict[str, Any]:
    """Return the record of a run: its matrix R, with a row for each stage, and its metrics."""
    missing = [None] * len(columns)
    R = [
        missing if model is None else scores(columns, run.tasks, journal.results[model.name])
        for model in (run.base, *run.stages)
    ]
    matrix = np.asarray(R, np.float64)  # None becomes NaN
    return {
        "strategy": run.strategy,
        "order": run.order,
        "seed": run.seed,
        "stages": [BASE, *run.tasks],
        "columns": in_order(columns, run.tasks),
        "num_tasks": len(run.tasks),
        "R": R,
        "metrics": measure(matrix, len(run.tasks)),
        "models": [model and model.name for model in (run.base, *run.stages)],
        "kept": kept and f"{MODELS}/{kept.name}",
        "matrix": f"{MATRICES}/{run.name}.json",
    }


def _base_metrics(run: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the metrics of the base, without those that need learning."""
    R = np.full((run["num_tasks"] + 1, len(run["columns"])), np.nan)
    R[-1] = run["R"][0]
    return measure(R, run["num_tasks"])


def _summary(runs: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    return {
        name: found._asdict() if isinstance(found, Summary) else None
        for name, found in summarise_runs(runs).items()
    }
