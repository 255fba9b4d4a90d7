"""Run continual learning by a recipe, and write its record, matrices and page.

All runs are planned before anything is trained: models are nodes of a graph, made when they are
first measured and removed once no later one needs them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from recall_jax.errors import InputError, UnfinishedError, storage_faults
from recall_jax.evaluation.task import Task
from recall_jax.experiments.continual.inputs import (
    check_inputs,
    find_columns,
    identify,
    load_columns,
)
from recall_jax.experiments.continual.journal import open_journal
from recall_jax.experiments.continual.lineage import MergedModel, Model, Tuned, ancestry, parts
from recall_jax.experiments.continual.plan import Run, plan_runs
from recall_jax.experiments.continual.recipe import Protocol
from recall_jax.experiments.continual.record import MATRICES, MODELS, make_continual_record, scores
from recall_jax.experiments.continual.workshop import Workshop
from recall_jax.files.json_objects import write_json_object
from recall_jax.files.output import work_folder
from recall_jax.files.progress import Progress, silent
from recall_jax.jobs.evaluate import EvaluateOptions
from recall_jax.report.continual_page import markdown_table, render_continual

RECORD, PAGE, TABLE = "continual.json", "index.html", "table.md"


@dataclass(frozen=True)
class ContinualOptions:
    """Set how runs are executed.

    `force` replaces an output, `resume` continues an interrupted one. `inputs` are files that OUT
    must not replace, such as the recipe. `plugins` are files of merge methods, loaded by
    `recipes.plugins`.
    """

    force: bool = False
    resume: bool = False
    inputs: Sequence[Path] = ()
    plugins: Sequence[Path] = ()


DEFAULTS = ContinualOptions()


def continual(
    protocol: Protocol,
    out: Path,
    *,
    options: ContinualOptions = DEFAULTS,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Execute all runs of a recipe, and write their record and the kept models to `out`.

    `announce` is called with the plan and with each step. Returns the record in `continual.json`.
    On an error `out` stays as it was. Raises InputError, before anything is trained, for faults of
    the recipe, its files or `out`; UnfinishedError, which keeps finished models for `resume`, for
    later faults.
    """
    runs = plan_runs(protocol)
    columns = find_columns(protocol)
    staged = [model for run in runs for model in run.stages if model is not None]
    evaluation = _evaluation(protocol)
    inputs = check_inputs(runs, staged, protocol.ignore_config, options.plugins)
    tasks = load_columns(columns, evaluation)
    identity = identify(inputs, tasks, evaluation)
    files = [*options.inputs, *map(Path, inputs), *(path for each in tasks for path in each.files)]
    with work_folder(out, force=options.force, resume=options.resume, inputs=files) as work:
        if work.discarded:
            announce("an interrupted run was discarded: --resume would have gone on with it")
        journal = open_journal(work.journal, identity)
        models = work.folder / MODELS
        with storage_faults(f"write {models}"):
            models.mkdir(exist_ok=True)
        shop = Workshop(models, journal, tasks, evaluation, progress)
        kept = {run.name: _folded(run.final) for run in runs if protocol.keep != "none"}
        announce(_describe(runs, staged, len(journal.results)))
        _execute(runs, columns, kept, shop, clear=protocol.keep != "all", announce=announce)
        record = make_continual_record(protocol, runs, columns, kept, journal)
        _write(work.folder, record)
    return record


def _evaluation(protocol: Protocol) -> EvaluateOptions:
    settings = protocol.evaluate
    return EvaluateOptions(
        data_root=None if settings.data_root is None else Path(settings.data_root),
        limit=settings.limit,
        seed=settings.seed,
        batch_size=settings.batch_size,
        compute_dtype=settings.compute_dtype,
        ignore_config=protocol.ignore_config,
    )


def _execute(
    runs: Sequence[Run],
    columns: Mapping[str, Task],
    kept: Mapping[str, Model],
    shop: Workshop,
    *,
    clear: bool,
    announce: Callable[[str], None],
) -> None:
    """Measure every stage of every run, and make the models that are kept."""
    steps = [
        (run, stage, model)
        for run in runs
        for stage, model in enumerate((run.base, *run.stages))
        if model is not None
    ]
    for number, (run, stage, model) in enumerate(steps, start=1):
        began, is_new = time.perf_counter(), model.name not in shop.journal.results
        where = f"seed {run.seed}, order {run.order}, {run.strategy}, {_stage_name(run, stage)}"
        try:
            results = shop.results(model)
            if stage == len(run.tasks) and run.name in kept:
                shop.make(kept[run.name])
        except InputError as error:  # keep the models made before
            raise UnfinishedError(f"{where}: {error}") from error
        if is_new:
            row = scores(columns, run.tasks, results)
            took = time.perf_counter() - began
            announce(f"{number}/{len(steps)} {where}: {_means(row, stage)}, {took:.1f} s")
        # A step measured before the interruption must not clear models that the next one needs.
        if clear and (is_new or number == len(steps)):
            ahead = [model for _, _, model in steps[number:]]
            shop.clear([m for m in ahead if m.name not in shop.journal.results] + [*kept.values()])


def _folded(model: Model) -> Model:
    """Return a model in a single folder: with its adapters folded in, if it has any."""
    if len(parts(model)) == 1:
        return model
    return MergedModel((model,), (None,), None, '{"merge_method": "average"}', label="folded")


def _describe(runs: Sequence[Run], staged: Sequence[Model], measured: int) -> str:
    """Describe the plan of all runs in a line."""
    models = ancestry(staged).values()
    counts = {
        "strategy": len({run.strategy for run in runs}),
        "order": len({run.order for run in runs}),
        "seed": len({run.seed for run in runs}),
        "fine-tuning": sum(isinstance(model, Tuned) for model in models),
        "merge": sum(isinstance(model, MergedModel) for model in models),
    }
    resumed = f"; {measured} models were measured before" * bool(measured)
    return ", ".join(_counted(*each) for each in counts.items()) + resumed


def _counted(what: str, count: int) -> str:
    if count == 1:
        return f"1 {what}"
    return f"{count:,} {what[:-1]}ies" if what.endswith("y") else f"{count:,} {what}s"


def _stage_name(run: Run, stage: int) -> str:
    return run.tasks[stage - 1] if stage else "base"


def _means(row: Sequence[float], stage: int) -> str:
    """Format the mean scores of the tasks learnt so far, and of all others."""
    means = {"seen": row[:stage], "others": row[stage:]}
    return ", ".join(f"{name} {fmean(values):.2f}" for name, values in means.items() if values)


def _write(folder: Path, record: dict[str, Any]) -> None:
    page, table = render_continual(record), markdown_table(record)
    with storage_faults(f"write {folder}"):
        (folder / MATRICES).mkdir(exist_ok=True)
        for run in record["runs"]:
            write_json_object(folder / run["matrix"], run)
        write_json_object(folder / RECORD, record)
        (folder / TABLE).write_text(table, encoding="utf-8")
        (folder / PAGE).write_text(page, encoding="utf-8")
