"""A merge job, from recipe to finished folder: where all rooms meet.

The command line, the demo and Python callers all come through `merge`.
"""

import platform
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_jax.checkpoint.folder import Checkpoint, file_warnings
from recall_jax.checkpoint.writer import DEFAULT_SHARD_BYTES, ShardedWriter, write_checksums
from recall_jax.engine.budget import (
    cacheable_bytes,
    fit_chunk_size,
    machine_bytes,
    memory_budget,
)
from recall_jax.engine.configs import check_configs
from recall_jax.engine.journal import MergeJournal, input_files, read_identity
from recall_jax.engine.layout import Layout, OnHost
from recall_jax.engine.merge import CheckpointWalk, Merge, PooledStates, check_layers
from recall_jax.engine.plan import MergePlan, open_models, plan_merge
from recall_jax.engine.pod.part import write_part
from recall_jax.engine.pod.shared import check_alike, shared_journal, shared_work
from recall_jax.engine.pod.writer import UnitWriter
from recall_jax.engine.sources import Inputs
from recall_jax.engine.stream import BACKLOG, merge_stream
from recall_jax.errors import InputError
from recall_jax.files.journal_lines import changed_input
from recall_jax.files.output import UnfinishedOutput, kept_journal, work_folder
from recall_jax.files.progress import Clock, Progress, Reporter, silent
from recall_jax.jobs.outcome import make_report, resolved, write_outcome
from recall_jax.jobs.prepare import prepare
from recall_jax.jobs.trees.names import names_tree
from recall_jax.methods.registry import METHODS
from recall_jax.parallel.machine import device, peak_memory_bytes, versions
from recall_jax.parallel.processes import ALONE, Processes
from recall_jax.recipes.recipe import Recipe

if TYPE_CHECKING:
    from recall_jax.engine.pod.tree_writer import TreeWriter


@dataclass(frozen=True)
class MergeOptions:
    """How a merge is run, beside what the recipe says is merged.

    `memory` is the budget in bytes, by default a share of what is free; `inputs` are files that
    OUT must not replace, beside the recipe's own; `plugins` the files that its method comes from,
    loaded by `recipes.plugins`. `mesh`, such as "data=2,fsdp=4" or "auto", cuts
    all tensors over several devices, those of all `processes` that run this same merge together;
    they write into one folder, or with `parts` each into an OUT of its own. The weights are `to` be
    "huggingface" (safetensors), or "orbax", the Flax tree that `jobs.convert` writes, of
    which nothing is on disk before the end, and nothing can be resumed.
    """

    force: bool = False
    resume: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES
    memory: int | None = None
    inputs: Collection[Path] = ()
    plugins: Collection[Path] = ()
    mesh: str | None = None
    processes: Processes = ALONE
    parts: bool = False
    to: str = "huggingface"


DEFAULTS = MergeOptions()


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
    if options.to not in ("huggingface", "orbax"):
        raise InputError(f"a merge cannot be written to {options.to!r}: use huggingface or orbax")
    if options.parts and options.to == "orbax":
        raise InputError("--parts is for safetensors: Orbax writes into a folder that all share")
    if options.parts and options.processes.count == 1:
        raise InputError("--parts is for several processes, and there is one: leave it out")
    check_alike(options.processes, "asked", _asked(recipe, out, options))
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
        if options.mesh is not None or processes.count > 1:
            _check_mesh(recipe)
        base_first = [] if recipe.base_model is None else [recipe.base_model]
        read = open_models([*base_first, *(entry.model for entry in recipe.models)])
        inputs = Inputs(read[1:], read[0]) if base_first else Inputs(read)
        warnings = check_configs(read, recipe.ignore_config)
        check_alike(processes, "models", {f"model {model.name}": _files(model) for model in read})
        host = platform.node()
        neighbours = processes.exchange("host", host).count(host)
        own = memory_budget(options.memory, neighbours=neighbours)
        budget = min(processes.exchange("budget", own))
        plan = plan_merge(inputs, out_dtype=recipe.out_dtype or recipe.dtype)
        check_layers(recipe.by_layer, plan.specs)
        held = sum(model.nbytes for model in read) // processes.count
        plan = replace(plan, larger_than_memory=held > cacheable_bytes(budget))
        layout, overhead = _layout(recipe, read, plan, out, options, budget)
        check_alike(processes, "layout", {"layout": layout.description})
        identity = _identity(recipe, inputs, options, layout)
    paths = [*options.inputs, *options.plugins, *_input_paths(recipe, read)]
    with _place(out, options, paths) as work:
        with (
            clock.stage("total"),
            _writer(work.folder, recipe, inputs.models, plan, layout, options) as writer,
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
        if path := changed_input(identity["inputs"], _inputs(recipe, read, options)):
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


def _pooled(merge: Merge[Any, Any], chooser: int, check: Callable[[int], None]) -> PooledStates:
    from recall_jax.engine.pooled import streamed_states

    return streamed_states(merge, chooser, check)


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
    if options.mesh is not None or options.processes.count > 1:
        mesh = named_mesh("auto" if options.mesh is None else options.mesh)
    return merge_trees_on_disk(
        recipe,
        out,
        force=options.force,
        inputs=[*options.inputs, *options.plugins],
        mesh=mesh,
        processes=options.processes,
        progress=progress,
        announce=announce,
    )


def _layout(
    recipe: Recipe,
    read: Sequence[Checkpoint],
    plan: MergePlan,
    out: Path,
    options: MergeOptions,
    budget: int,
) -> tuple[Layout, int]:
    """Where the tensors lie, and the bytes that merging them takes."""
    if options.mesh is not None or options.processes.count > 1:
        from recall_jax.engine.pod.prepare import sharded_layout

        asked = "auto" if options.mesh is None else options.mesh
        if asked == "auto" and options.resume:  # less may be free now than when it was chosen
            asked = options.processes.broadcast("mesh", lambda: _mesh_before(out)) or asked
        return sharded_layout(
            recipe.needs,
            read,
            plan,
            asked,
            budget,
            forward_dtype=recipe.compute_dtype,
            ignore_config=recipe.ignore_config,
        )
    chunk, beside = fit_chunk_size(read, plan.specs, BACKLOG, budget, needs=recipe.needs)
    return OnHost(chunk), beside


def _check_mesh(recipe: Recipe) -> None:
    """Raise InputError where the method, or its samples, are for one host alone."""
    from recall_jax.engine.pod.prepare import ON_MESH

    alone = "leave --mesh and --distributed out"
    if not ON_MESH.meets(recipe.needs):
        raise InputError(f"{recipe.merge_method} runs on one host: {alone}")
    if recipe.samples is not None and recipe.samples.source == "generated":
        raise InputError(f"samples.source generated runs a whole model on one host: {alone}")


def _mesh_before(out: Path) -> str | None:
    """The mesh of an interrupted merge into `out`, if there is one that has a mesh."""
    sizes = read_identity(kept_journal(out)).get("program", {}).get("mesh") or {}
    return ",".join(f"{axis}={size}" for axis, size in sizes.items()) or None


def _place(
    out: Path, options: MergeOptions, inputs: Collection[Path]
) -> AbstractContextManager[UnfinishedOutput]:
    """Where the output grows: in a folder of this process's own, or of all processes'."""
    alone = options.processes.count == 1 or options.parts
    place = work_folder if alone else partial(shared_work, processes=options.processes)
    return place(out, force=options.force, resume=options.resume, inputs=inputs)


def _writer(
    folder: Path,
    recipe: Recipe,
    models: Sequence[Checkpoint],
    plan: MergePlan,
    layout: Layout,
    options: MergeOptions,
) -> "ShardedWriter | UnitWriter | TreeWriter":
    if options.to == "orbax":
        from recall_jax.engine.inputs import common_architecture
        from recall_jax.engine.pod.tree_writer import TreeWriter
        from recall_jax.parallel.mesh import make_mesh

        arch = common_architecture(models, recipe.ignore_config)
        return TreeWriter(folder, arch, plan.specs, layout.mesh or make_mesh({}))
    if options.processes.count == 1:
        return ShardedWriter(folder, plan.specs, options.shard_bytes)
    return UnitWriter(
        folder,
        plan.units,
        plan.specs,
        options.processes,
        options.shard_bytes,
        shared=not options.parts,
    )


def _finish_unit(
    unit: str,
    models: Sequence[Checkpoint],
    journal: MergeJournal,
    writer: "ShardedWriter | UnitWriter | TreeWriter",
) -> None:
    """Note a unit once it is written, unless the models' files are no longer what they were."""
    for model in models:
        if path := model.changed():
            raise InputError(f"{path} was changed while it was being merged: start again")
    writer.finish_unit(partial(journal.record_unit, unit))


def _asked(recipe: Recipe, out: Path, options: MergeOptions) -> dict[str, Any]:
    """What all processes of a merge must be told alike."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "OUT": None if options.parts else str(out),
        "--resume": options.resume,
        "--mesh": options.mesh,
        "--parts": options.parts,
        "--to": options.to,
        "--shard-size": options.shard_bytes,
        "version": versions(),
    }


def _files(model: Checkpoint) -> list[str]:
    """The files of a model by size and hash, wherever they lie and since when."""
    found = model.fingerprint(content=False).values()
    return sorted(f"{size} {digest}" for size, *_, digest in found)


def _identity(
    recipe: Recipe, inputs: Inputs[Checkpoint], options: MergeOptions, layout: Layout
) -> dict[str, Any]:
    """What makes a merge the same merge: only then may one go on where another has stopped."""
    repeatable = resolved(recipe, inputs, recipe.compute_dtype)
    return {
        "inputs": _inputs(recipe, inputs.all, options),
        "recipe": repeatable.model_dump(mode="json"),
        "program": {
            **versions(),
            "device": device(),
            "shard_size": options.shard_bytes,
            "layout": layout.description,
            "mesh": layout.mesh and dict(layout.mesh.shape),
            "to": options.to,
        },
    }


def _inputs(recipe: Recipe, read: Sequence[Checkpoint], options: MergeOptions) -> dict[str, Any]:
    """What the files of a merge are known by, so that it is resumed with the same.

    Weights that one machine can hold by their content, which then lies in its memory for the walk;
    others by their times, as reading them once more would be most of a merge.
    """
    held = sum(model.nbytes for model in read) <= machine_bytes()
    content = held and options.processes.count == 1 and options.to == "huggingface"
    return input_files(read, [*_input_files(recipe), *options.plugins], content=content)


def _describe(models: Sequence[Checkpoint], plan: MergePlan, budget: int, resumed: int) -> str:
    """The plan of a merge in a line."""
    read = sum(model.nbytes for model in models) / 1e6
    rest = [name for names in list(plan.units.values())[resumed:] for name in names]
    written = sum(plan.specs[name].nbytes for name in rest) / 1e6
    units = f"{len(plan.units)} units" + (f", {resumed} of them written already" * bool(resumed))
    return (
        f"{len(models)} models of {units}: {read:,.1f} MB to read, {written:,.1f} MB to "
        f"write, {budget / 1e6:,.0f} MB of memory allowed"
    )


def _input_paths(recipe: Recipe, models: Sequence[Checkpoint]) -> list[Path]:
    """Every file and folder that the recipe reads."""
    folders = [folder for model in models for folder in (model.folder, *model.adapters)]
    return [*folders, *_input_files(recipe)]


def _input_files(recipe: Recipe) -> list[Path]:
    files = [recipe.weights, recipe.base_data, *(entry.data for entry in recipe.models)]
    if recipe.samples is not None:
        files += [recipe.samples.data, recipe.samples.typical, recipe.samples.prompts]
    return [Path(name) for name in files if name]
