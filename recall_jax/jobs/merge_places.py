"""Choose where a merge computes and writes: layout, output folder and writer."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.checkpoint.writer import ShardedWriter
from recall_jax.engine.budget import fit_chunk_size
from recall_jax.engine.journal import read_identity
from recall_jax.engine.layout import Layout, OnHost
from recall_jax.engine.plan import MergePlan
from recall_jax.engine.pod.shared import shared_work
from recall_jax.engine.pod.writer import UnitWriter
from recall_jax.engine.stream import BACKLOG
from recall_jax.errors import InputError
from recall_jax.files.output import UnfinishedOutput, kept_journal, work_folder
from recall_jax.jobs.merge_options import MergeOptions
from recall_jax.recipes.recipe import Recipe

if TYPE_CHECKING:
    from recall_jax.engine.pod.tree_writer import TreeWriter

    MergeWriter: TypeAlias = ShardedWriter | UnitWriter | TreeWriter


def make_layout(
    recipe: Recipe,
    read: Sequence[Checkpoint],
    plan: MergePlan,
    out: Path,
    options: MergeOptions,
    budget: int,
) -> tuple[Layout, int]:
    """Return where the tensors lie, and the overhead of merging them in bytes.

    Raises InputError for a mesh that does not fit, UnfinishedError where the memory is too small.
    """
    if options.distributed:
        from recall_jax.engine.pod.prepare import sharded_layout

        asked = "auto" if options.mesh is None else options.mesh
        if asked == "auto" and options.resume:  # less may be free now than when it was chosen
            asked = options.processes.broadcast("mesh", lambda: _previous_mesh(out)) or asked
        return sharded_layout(
            recipe.needs,
            read,
            plan,
            asked,
            budget,
            forward_dtype=recipe.compute_dtype,
            ignore_config=recipe.ignore_config,
        )
    chunk, overhead = fit_chunk_size(read, plan.specs, BACKLOG, budget, needs=recipe.needs)
    return OnHost(chunk), overhead


def check_mesh(recipe: Recipe) -> None:
    """Raise InputError if the method, or its samples, cannot run over a mesh."""
    from recall_jax.engine.pod.prepare import ON_MESH

    alone = "leave --mesh and --distributed out"
    if not ON_MESH.meets(recipe.needs):
        raise InputError(f"{recipe.merge_method} runs on one host: {alone}")
    if recipe.samples is not None and recipe.samples.source == "generated":
        raise InputError(f"samples.source generated runs a whole model on one host: {alone}")


def _previous_mesh(out: Path) -> str | None:
    """Return the mesh of an interrupted merge into `out`, if that had one."""
    sizes = read_identity(kept_journal(out)).get("program", {}).get("mesh") or {}
    return ",".join(f"{axis}={size}" for axis, size in sizes.items()) or None


def unfinished_output(
    out: Path, options: MergeOptions, inputs: Collection[Path]
) -> AbstractContextManager[UnfinishedOutput]:
    """Open the hidden folder in which the output grows, one for all processes but with `parts`."""
    alone = options.processes.count == 1 or options.parts
    opened = work_folder if alone else partial(shared_work, processes=options.processes)
    return opened(out, force=options.force, resume=options.resume, inputs=inputs)


def open_writer(
    folder: Path,
    recipe: Recipe,
    models: Sequence[Checkpoint],
    plan: MergePlan,
    layout: Layout,
    options: MergeOptions,
) -> "MergeWriter":
    """Return the writer of the merged tensors into the folder in which the output grows."""
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
