"""Run an ablation: each variant is merged, evaluated and removed; then the page is written.

The results of each run are kept, so that an interrupted ablation can be resumed after the last
finished one.
"""

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.engine.inputs import compute_dtype
from recall_jax.errors import InputError, UnfinishedError, storage_faults
from recall_jax.evaluation.resident import with_weights, without_weights
from recall_jax.evaluation.scoring import score
from recall_jax.experiments.ablation.plan import AblationPlan, plan_ablation
from recall_jax.experiments.ablation.recipe import RECIPE_RUN, Ablation
from recall_jax.experiments.ablation.record import make_ablation_record
from recall_jax.experiments.ablation.scores import counted_metric, row_shares
from recall_jax.experiments.ablation.units import analyse_units
from recall_jax.files.json_objects import write_json_object
from recall_jax.files.output import work_folder
from recall_jax.files.progress import Progress, silent
from recall_jax.files.results import Results, resume_results
from recall_jax.jobs import merge as job
from recall_jax.recipes.recipe import Recipe
from recall_jax.report.ablation_page import render_ablation, tables_in_markdown

RECORD, PAGE, TABLE = "ablation.json", "index.html", "table.md"
_REPORTED = ("weights", "similarity", "sigma", "typical_samples", "typical", "warnings")


@dataclass(frozen=True)
class AblationOptions:
    """Set how an ablation runs; `memory` is the memory budget of a merge in bytes.

    `force` replaces an output, `resume` continues an interrupted one. `inputs` are files that OUT
    must not replace, in addition to those that the recipe names.
    """

    memory: int | None = None
    force: bool = False
    resume: bool = False
    inputs: Collection[Path] = ()


DEFAULTS = AblationOptions()


def ablate(
    ablation: Ablation,
    out: Path,
    *,
    options: AblationOptions = DEFAULTS,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Merge and evaluate every variant, and write the record, a page and the tables to `out`.

    `announce` is called with the plan. Returns the record in `ablation.json`. Raises InputError,
    before anything is merged, for faults of the recipe, the models, the rows or `out`;
    UnfinishedError, which keeps finished runs for `resume`, for later faults.
    """
    plan = plan_ablation(ablation)
    opened = [plan.base, *plan.models]
    inputs = [*options.inputs]
    inputs += [path for model in opened for path in (model.folder, *model.adapters)]
    inputs += plan.files()
    with work_folder(out, force=options.force, resume=options.resume, inputs=inputs) as work:
        if options.resume:
            results = resume_results(work.journal, plan.identity(), "ablation")
        else:
            results = Results(work.journal, plan.identity())
        announce(_describe(plan, len(results.values)))
        for done, (name, recipe) in enumerate(plan.runs.items()):
            progress(name, done, len(plan.runs))
            if name not in results.values:
                shutil.rmtree(work.scratch, ignore_errors=True)  # left by a run that was killed
                work.scratch.mkdir()
                results.keep(name, _run(name, recipe, plan, work.scratch, options))
        record = make_ablation_record(plan, results.values)
        page, tables = render_ablation(record), tables_in_markdown(record)
        with storage_faults(f"write {out}"):
            write_json_object(work.folder / RECORD, record)
            (work.folder / PAGE).write_text(page, encoding="utf-8")
            (work.folder / TABLE).write_text(tables, encoding="utf-8")
    return record


def _run(
    name: str, recipe: Recipe | str, plan: AblationPlan, scratch: Path, options: AblationOptions
) -> dict[str, Any]:
    """Evaluate a merge, or an existing model; return JSON values: results, or why it failed."""
    if isinstance(recipe, str):
        return _scores(recipe, plan)
    merged = scratch / "merged"
    try:
        report = job.merge(recipe, merged, options=job.MergeOptions(memory=options.memory))
    except UnfinishedError:
        raise
    except InputError as error:
        if name not in plan.varied:
            raise
        return {"error": str(error)}
    found = _scores(str(merged), plan) | {key: report[key] for key in _REPORTED}
    if name == RECIPE_RUN and plan.domains:
        found["domains"] = analyse_units(plan, merged, scratch, options.memory)
    return found


def _scores(model: str, plan: AblationPlan) -> dict[str, Any]:
    """Return a model's metrics on every task, and each row's share of the counted metric."""
    checkpoint = open_checkpoint(model)
    resident = with_weights(without_weights(checkpoint, plan.ablation.ignore_config), checkpoint)
    dtype = compute_dtype(plan.ablation.compute_dtype, checkpoint)
    results, shares = {}, {}
    for each in plan.tasks:
        scored = score(
            each.task,
            each.examples,
            resident,
            batch_size=plan.ablation.evaluate.batch_size,
            dtype=dtype,
        )
        name = each.task.task
        results[name] = {key: value._asdict() for key, value in scored.metrics.items()}
        shares[name] = row_shares(counted_metric(each.task), scored.predictions)
    return {"results": results, "shares": shares}


def _describe(plan: AblationPlan, done: int) -> str:
    rows = sum(len(each.examples) for each in plan.tasks)
    merges = sum(isinstance(recipe, Recipe) for recipe in plan.runs.values())
    return (
        f"{merges} merges of {len(plan.models)} models, each evaluated on {rows:,} rows of "
        f"{len(plan.tasks)} tasks" + f"; {done} of {len(plan.runs)} done already" * bool(done)
    )
