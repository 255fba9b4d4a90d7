"""Run the demo: merge the shipped models, and evaluate all models on all five tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from recall_jax.evaluation.exact_match import Row, exact_matches
from recall_jax.experiments.demo.material import (
    BASE,
    CHECKPOINTS,
    FINE_TUNED,
    TASKS,
    UNSEEN,
    held_out_file,
    training_file,
)
from recall_jax.files.json_objects import write_json_object
from recall_jax.files.output import output_folder
from recall_jax.files.progress import Progress, silent
from recall_jax.inputs.data import read_rows
from recall_jax.inputs.settings import TYPICAL
from recall_jax.inputs.shapes import row_content
from recall_jax.jobs.merge import merge
from recall_jax.recipes.recipe import Recipe, make_recipe
from recall_jax.report.html import Table, render_html

RECALL, AVERAGE = "recall", "average"
NEWEST = FINE_TUNED[-1]
EVALUATION, PAGE = "evaluation.json", "report.html"

Scores = Mapping[str, Mapping[str, float]]
"""Exact match by model and task."""

_BATCH_SIZE = 128

_CAPTION = (
    "Share of {count} held-out prompts of each task that a model completes exactly, decoded "
    f"greedily. {BASE} has learned every task in part, each fine-tune one task more, its own; "
    f"{' and '.join(UNSEEN)} have no fine-tune: they are unseen. The own task of a merge is the "
    f"newest, {NEWEST}. Other seen is the mean over the other tasks that have a fine-tune, unseen "
    "that over those that have none. Forgetting is what a model has lost of what "
    f"{BASE} knew: the mean over all tasks of max(0, score of {BASE} - score of the model)."
)


def run_demo(out: Path, *, force: bool = False, progress: Progress = silent) -> Table:
    """Merge by RECALL and by averaging, evaluate, and return the table of exact matches.

    `out` is written atomically. It holds the merged models `recall/` and `average/`, the table as
    `evaluation.json`, and `report.html`, RECALL's report with the table in it.
    """
    with output_folder(out, force=force) as folder:
        report = merge(_recipe(RECALL), folder / RECALL, progress=progress)
        merge(_recipe(AVERAGE), folder / AVERAGE, progress=progress)
        models = {name: CHECKPOINTS / name for name in (BASE, *FINE_TUNED)}
        models |= {name: folder / name for name in (RECALL, AVERAGE)}
        tests = [read_rows(held_out_file(task)) for task in TASKS]
        scores = _evaluate(models, tests, progress)
        table = score_table(scores, count=len(tests[0]))
        write_json_object(folder / EVALUATION, asdict(table), indent=2)
        texts = [
            "".join(map(str, row_content(row, TYPICAL)))
            for row in read_rows(folder / RECALL / TYPICAL)
        ]
        (folder / PAGE).write_text(render_html(report, texts, [table]), encoding="utf-8")
    return table


def _evaluate(
    models: Mapping[str, Path], tests: Sequence[Sequence[Row]], progress: Progress
) -> Scores:
    """Return the exact matches of every model; all tasks have the same number of rows."""
    rows = [row for test in tests for row in test]
    scores = {}
    for done, (name, model) in enumerate(models.items()):
        progress(f"evaluating {name}", done, len(models))
        right = exact_matches(model, rows, _BATCH_SIZE).reshape(len(TASKS), -1)
        scores[name] = dict(zip(TASKS, right.mean(axis=1).tolist(), strict=True))
    return scores


def score_table(scores: Scores, count: int) -> Table:
    """Return a table with each model's scores, means and forgetting, as its caption defines."""
    columns = ("model", *TASKS, "own task", "other seen", "unseen", "forgetting")
    rows = [_row(model, scores) for model in scores]
    return Table("Evaluation", columns, rows, _CAPTION.format(count=count))


def _row(model: str, scores: Scores) -> list[str | float | None]:
    score = scores[model]
    own_task = None if model == BASE else model if model in FINE_TUNED else NEWEST
    lost = [max(0.0, scores[BASE][task] - score[task]) for task in TASKS]
    return [
        model,
        *(score[task] for task in TASKS),
        None if own_task is None else score[own_task],
        fmean(score[task] for task in FINE_TUNED if task != own_task),
        fmean(score[task] for task in UNSEEN),
        None if model == BASE else fmean(lost),
    ]


def _shown(path: Path) -> Path:
    """Return the path as the report shows it, relative to the current folder if possible."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _recipe(method: str) -> Recipe:
    models = [{"model": str(_shown(CHECKPOINTS / name))} for name in (BASE, *FINE_TUNED)]
    recipe: dict[str, Any] = {"merge_method": method, "models": models}
    if method == RECALL:
        recipe["samples"] = {"data": str(training_file(NEWEST))}
    return make_recipe(recipe)
