"""A continual-learning run, from a recipe to its record, matrices and page.

Runs are planned whole before anything is trained: models are nodes of a graph, made when they are
first to be measured and cleared away when no later one needs them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from recall_jax.errors import InputError, UnfinishedError, storage_faults
from recall_jax.evaluation.task import Task
from recall_jax.experiments.continual.inputs import ask_all, check_inputs, find_columns, identify
from recall_jax.experiments.continual.journal import open_journal
from recall_jax.experiments.continual.lineage import MergedModel, Model, Tuned, ancestry, parts
from recall_jax.experiments.continual.plan import Run, plan_runs
from recall_jax.experiments.continual.recipe import Protocol
from recall_jax.experiments.continual.record import MATRICES, MODELS, make_continual_record, scores
from recall_jax.experiments.continual.workshop import Workshop
from recall_jax.files.json_objects import write_json_object
from recall_jax.files.output import work_folder
from recall_jax.files.progress import Progress, silent
from recall_jax.jobs.evaluate import EvaluateOptions as Evaluation
from recall_jax.report.continual_page import markdown_table, render_continual

RECORD, PAGE, TABLE = "continual.json", "index.html", "table.md"


@dataclass(frozen=True)
class ContinualOptions:
    """How a run is carried out; OUT must not replace `inputs`, such as the recipe.

    `plugins` are the files of merge methods, loaded by `recipes.plugins`.
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
    """Carry out all runs of a recipe: `out` becomes the record of them, or stays as it was.

    `announce` hears the plan, and each step. Returns the record, as `continual.json` holds it.
    Raises InputError, before anything is trained, for what is wrong with the recipe, its files or
    `out`; UnfinishedError, which leaves what is done for `resume`, for all that goes wrong later.
    """
    runs = plan_runs(protocol)
    columns = find_columns(protocol)
    staged = [model for run in runs for model in run.stages if model is not None]
    evaluation = _evaluation(protocol)
    inputs = check_inputs(runs, staged, protocol.ignore_config, options.plugins)
    asked = ask_all(columns, evaluation)
    identity = identify(inputs, asked, evaluation)
    files = [*options.inputs, *map(Path, inputs), *(path for each in asked for path in each.files)]
    with work_folder(out, force=options.force, resume=options.resume, inputs=files) as work:
        if work.discarded:
            announce("an interrupted run was discarded: --resume would have gone on with it")
        journal = open_journal(work.journal, identity)
        models = work.folder / MODELS
        with storage_faults(f"write {models}"):
            models.mkdir(exist_ok=True)
        shop = Workshop(models, journal, asked, evaluation, progress)
        kept = {run.name: _on_its_own(run.final) for run in runs if protocol.keep != "none"}
        announce(_describe(runs, staged, len(journal.results)))
        _carry_out(runs, columns, kept, shop, clear=protocol.keep != "all", announce=announce)
        record = make_continual_record(protocol, runs, columns, kept, journal)
        _write(work.folder, record)
    return record


def _evaluation(protocol: Protocol) -> Evaluation:
    asked = protocol.evaluate
    return Evaluation(
        data_root=None if asked.data_root is None else Path(asked.data_root),
        limit=asked.limit,
        seed=asked.seed,
        batch_size=asked.batch_size,
        compute_dtype=asked.compute_dtype,
        ignore_config=protocol.ignore_config,
    )


def _carry_out(
    runs: Sequence[Run],
    columns: Mapping[str, Task],
    kept: Mapping[str, Model],
    shop: Workshop,
    *,
    clear: bool,
    announce: Callable[[str], None],
) -> None:
    """Measure every stage of every run, and leave the models that are kept."""
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
        except InputError as error:  # what was made before it is worth keeping
            raise UnfinishedError(f"{where}: {error}") from error
        if is_new:
            row = scores(columns, run.tasks, results)
            took = time.perf_counter() - began
            announce(f"{number}/{len(steps)} {where}: {_told(row, stage)}, {took:.1f} s")
        # An earlier step, taken up again, has nothing to clear but what the next one goes on with.
        if clear and (is_new or number == len(steps)):
            ahead = [model for _, _, model in steps[number:]]
            shop.clear([m for m in ahead if m.name not in shop.journal.results] + [*kept.values()])


def _on_its_own(model: Model) -> Model:
    """A model in one folder: with its adapters folded in, if it has any."""
    if len(parts(model)) == 1:
        return model
    return MergedModel((model,), (None,), None, '{"merge_method": "average"}', label="folded")


def _describe(runs: Sequence[Run], staged: Sequence[Model], measured: int) -> str:
    """The plan of all runs in a line."""
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


def _told(row: Sequence[float], stage: int) -> str:
    """The mean scores of the tasks learnt so far and of all others."""
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
