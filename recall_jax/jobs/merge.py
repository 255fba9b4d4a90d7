"""Run a merge, from the recipe to the finished folder.

The command line, the demo and Python callers all come through `merge`.
"""

import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_jax.checkpoint.folder import Checkpoint, file_warnings
from recall_jax.checkpoint.writer import write_checksums
from recall_jax.engine.budget import (
    cacheable_bytes,
    memory_budget,
)
from recall_jax.engine.configs import check_configs
from recall_jax.engine.journal import MergeJournal
from recall_jax.engine.merge import CheckpointWalk, Merge, PooledStates, check_layers
from recall_jax.engine.plan import MergePlan, open_inputs, plan_merge
from recall_jax.engine.pod.part import write_part
from recall_jax.engine.pod.shared import check_alike, shared_journal
from recall_jax.engine.pod.writer import UnitWriter
from recall_jax.engine.stream import merge_stream
from recall_jax.errors import InputError
from recall_jax.files.journal_lines import changed_input
from recall_jax.files.progress import Clock, Progress, Reporter, silent
from recall_jax.jobs.merge_identity import (
    common_request,
    file_digests,
    identify_files,
    merge_identity,
    merge_input_paths,
)
from recall_jax.jobs.merge_options import DEFAULTS, MergeOptions
from recall_jax.jobs.merge_places import check_mesh, make_layout, open_writer, unfinished_output
from recall_jax.jobs.outcome import make_report, resolved, write_outcome
from recall_jax.jobs.prepare import prepare
from recall_jax.jobs.trees.names import names_tree
from recall_jax.methods.registry import METHODS
from recall_jax.parallel.machine import peak_memory_bytes
from recall_jax.recipes.recipe import Recipe

if TYPE_CHECKING:
    from recall_jax.jobs.merge_places import MergeWriter

__all__ = ["DEFAULTS", "MergeOptions", "merge"]


def merge(
    recipe: Recipe,
    out: Path,
    *,
    options: MergeOptions = DEFAULTS,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Carry out a recipe: `out` becomes the merged model with its report, or stays as it was.

    `announce` hears the plan before weights are read. Returns the report, as `recall_report.json`
    holds it. Raises InputError for whatever is wrong with the recipe, the models, the data or
    `out`; UnfinishedError, which leaves what is done for `resume`, where disk or memory fail.
    """
    check_alike(options.processes, "asked", common_request(recipe, out, options))
    if recipe.tree is not None or names_tree(recipe.models[-1].model):
        return _merge_trees(recipe, out, options, progress, announce)
    lines: list[str] = []
    processes = options.processes

    def tell(line: str) -> None:
        lines.append(line)
        announce(line)

    clock = Clock()
    reporter = Reporter(progress, clock, tell)
    with clock.stage("total"):
        if options.distributed:
            check_mesh(recipe)
        inputs = open_inputs([entry.model for entry in recipe.models], recipe.base_model)
        read = inputs.all
        warnings = check_configs(read, recipe.ignore_config)
        check_alike(
            processes, "models", {f"model {model.name}": file_digests(model) for model in read}
        )
        host = platform.node()
        neighbours = processes.exchange("host", host).count(host)
        own = memory_budget(options.memory, neighbours=neighbours)
        budget = min(processes.exchange("budget", own))
        plan = plan_merge(inputs, out_dtype=recipe.out_dtype or recipe.dtype)
        check_layers(recipe.by_layer, plan.specs)
        held = sum(model.nbytes for model in read) // processes.count
        plan = replace(plan, larger_than_memory=held > cacheable_bytes(budget))
        layout, overhead = make_layout(recipe, read, plan, out, options, budget)
        check_alike(processes, "layout", {"layout": layout.description})
        identity = merge_identity(recipe, inputs, options, layout)
    paths = [*options.files, *merge_input_paths(recipe, read)]
    with unfinished_output(out, options, paths) as work:
        with (
            clock.stage("total"),
            open_writer(work.folder, recipe, inputs.models, plan, layout, options) as writer,
        ):
            journal = shared_journal(
                work.journal,
                identity,
                list(plan.units),
                writer,
                processes,
                resume=options.resume,
                separate_disks=options.parts,
            )
            if work.discarded:
                tell("an interrupted merge was discarded: --resume would have gone on with it")
            resumed = len(journal.units)
            tell(_describe(read, plan, budget, resumed))
            if layout.description is not None:
                tell(layout.description)
            walk = CheckpointWalk(
                inputs,
                plan,
                layout,
                budget,
                overhead,
                processes.broadcast,
                _pooled,
                recipe.compute_dtype,
                recipe.ignore_config,
            )
            prepared = prepare(recipe, walk, journal, reporter)
            merge_stream(
                replace(plan, inputs=prepared.inputs or plan.inputs),
                prepared.rule,
                writer,
                layout=layout,
                kernel=METHODS[recipe.merge_method].kernel(recipe.parameters),
                reference=-1 if prepared.reference is None else prepared.reference,
                clock=clock,
                finished=lambda unit: _finish_unit(unit, read, journal, writer),
                resumed=resumed,
                needs=recipe.needs,
                progress=progress,
            )
        if path := changed_input(identity["inputs"], identify_files(recipe, read, options)):
            raise InputError(f"{path} was changed while it was being merged: start again")
        names = [model.name for model in inputs.models]
        report = make_report(recipe, prepared, names, list(plan.units))
        took = processes.exchange(
            "took",
            {
                "read": sum(model.bytes_read for model in read),
                "written": writer.bytes_written,
                "peak_memory_bytes": peak_memory_bytes(),
            },
        )
        report |= {
            "warnings": [*warnings, *file_warnings(read), *report["warnings"]],
            "timing_s": clock.seconds,
            "bytes": {key: sum(each[key] for each in took) for key in ("read", "written")},
            "peak_memory_bytes": max(each["peak_memory_bytes"] for each in took),
            "memory": {
                "budget_bytes": budget,
                "planned_bytes": prepared.planned_bytes,
                **layout.partition,
                **prepared.batching,
            },
            "plan": lines,
            "resumed_units": resumed,
        }
        if processes.count > 1:
            report["processes"] = took
        if options.plugins:
            report["plugins"] = [str(path.resolve()) for path in options.plugins]
        if options.to == "orbax":
            report["tree"] = {"format": "orbax"}
        repeatable = resolved(recipe, inputs, prepared.compute_dtype)
        if processes.index == 0:
            write_outcome(work.folder, out.name, repeatable, read, prepared, report)
        if isinstance(writer, UnitWriter) and options.parts:
            write_part(work.folder, processes, writer)
            processes.barrier("written")  # no part is made OUT while another may still fail
        elif processes.index == 0:
            write_checksums(work.folder, writer.checksums)
    return report


def _pooled(merge: Merge[Any, Any], selector: int, check: Callable[[int], None]) -> PooledStates:
    from recall_jax.engine.pooled import streamed_states

    return streamed_states(merge, selector, check)


def _merge_trees(
    recipe: Recipe,
    out: Path,
    options: MergeOptions,
    progress: Progress,
    announce: Callable[[str], None],
) -> dict[str, Any]:
    from recall_jax.jobs.trees.on_disk import merge_trees_on_disk
    from recall_jax.parallel.mesh import named_mesh

    if options.parts:
        raise InputError("--parts is not for JAX trees: write into a folder that all share")
    if options.to == "orbax":
        raise InputError("--to is not for JAX trees: what is merged keeps the newest's format")
    mesh = None
    if options.distributed:
        mesh = named_mesh("auto" if options.mesh is None else options.mesh)
    return merge_trees_on_disk(
        recipe,
        out,
        force=options.force,
        inputs=options.files,
        mesh=mesh,
        processes=options.processes,
        progress=progress,
        announce=announce,
    )


def _finish_unit(
    unit: str,
    models: Sequence[Checkpoint],
    journal: MergeJournal,
    writer: "MergeWriter",
) -> None:
    """Record a unit once it is written; raises InputError if a model's file has changed."""
    for model in models:
        if path := model.changed():
            raise InputError(f"{path} was changed while it was being merged: start again")
    writer.finish_unit(partial(journal.record_unit, unit))


def _describe(models: Sequence[Checkpoint], plan: MergePlan, budget: int, resumed: int) -> str:
    """Return the plan of a merge in one line."""
    read = sum(model.nbytes for model in models) / 1e6
    rest = [name for names in list(plan.units.values())[resumed:] for name in names]
    written = sum(plan.specs[name].nbytes for name in rest) / 1e6
    units = f"{len(plan.units)} units" + (f", {resumed} of them written already" * bool(resumed))
    return (
        f"{len(models)} models of {units}: {read:,.1f} MB to read, {written:,.1f} MB to "
        f"write, {budget / 1e6:,.0f} MB of memory allowed"
    )
