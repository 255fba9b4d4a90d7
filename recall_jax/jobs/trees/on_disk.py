"""Merge JAX trees on disk by a recipe, and write the merged tree to a folder."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import DictKey

from recall_jax.checkpoint.dtypes import DTYPES
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.units import stacks_of
from recall_jax.checkpoint.writer import write_checksums
from recall_jax.engine.journal import MergeJournal
from recall_jax.engine.kernel import Values
from recall_jax.engine.merge import Prepared, check_layers
from recall_jax.engine.plan import units_of
from recall_jax.engine.pod.shared import shared_work
from recall_jax.engine.sources import Inputs
from recall_jax.errors import InputError
from recall_jax.files.output import output_folder
from recall_jax.files.progress import Clock, Progress, Reporter, silent
from recall_jax.jobs.outcome import make_report
from recall_jax.jobs.prepare import prepare
from recall_jax.jobs.trees.files import FORMATS, Leaf, TreeFile, open_tree, read_leaves, write_tree
from recall_jax.jobs.trees.leaves import GROUP_BYTES, merge_leaves
from recall_jax.jobs.trees.merge_trees import dotted_path
from recall_jax.jobs.trees.outcome import input_paths, resolved_trees, write_tree_outcome
from recall_jax.jobs.trees.places import Place, place_leaves, slice_specs
from recall_jax.jobs.trees.walk import TreeWalk
from recall_jax.methods.registry import METHODS
from recall_jax.parallel.machine import peak_memory_bytes
from recall_jax.parallel.processes import ALONE, Processes
from recall_jax.recipes.recipe import Recipe


@dataclass(frozen=True)
class _Plan:
    """Hold the trees, the places of their leaves, and the specs of their slices by name."""

    inputs: Inputs[TreeFile]
    places: Mapping[str, Place]
    slices: Mapping[str, TensorSpec]

    @property
    def units(self) -> list[str]:
        return list(units_of(self.slices))


def merge_trees_on_disk(
    recipe: Recipe,
    out: Path,
    *,
    force: bool = False,
    inputs: Collection[Path] = (),
    mesh: Mesh | None = None,
    processes: Processes = ALONE,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Merge the JAX trees of a recipe, and write a tree to `out` with the newest's structure.

    Leaves are read and merged in groups, sharded over the devices of the mesh if there is one; the
    merged tree stays in memory until it is written. All processes must call this. Returns the
    report in `recall_report.json`. Raises InputError for faults of the recipe, the trees, the
    forward, the data or `out`.
    """
    clock, lines = Clock(), []

    def note(line: str) -> None:
        lines.append(line)
        announce(line)

    with clock.stage("total"):
        plan = _open(recipe)
        newest = plan.inputs.newest
        if processes.count > 1 and FORMATS[type(newest)] != "orbax":
            raise InputError(
                f"{newest.name} is no Orbax checkpoint, which several processes could write: run "
                "one process, or save it by Orbax first"
            )
        note(_describe(plan, mesh))
    read_paths = [*inputs, *input_paths(recipe, plan.inputs.all)]
    with _output_folder(out, force, read_paths, processes) as folder:
        with clock.stage("total"):
            walk = TreeWalk(recipe, plan.inputs.models, plan.places, plan.slices, mesh)
            journal, reporter = MergeJournal(None, {}), Reporter(progress, clock, note)
            prepared = prepare(recipe, walk, journal, reporter)
            with clock.stage("merge"):
                written = _merge(recipe, plan, prepared, folder, mesh, progress)
        report = make_report(
            recipe, prepared, [tree.name for tree in plan.inputs.models], plan.units
        )
        read = sum(tree.bytes_read for tree in plan.inputs.all)
        used = {"read": read, "peak_memory_bytes": peak_memory_bytes()}
        used_by_each = processes.exchange("took", used)
        report |= {
            "tree": {"format": FORMATS[type(newest)], "leaves": len(plan.places)},
            "timing_s": clock.seconds,
            "bytes": {"read": sum(each["read"] for each in used_by_each), "written": written},
            "peak_memory_bytes": max(each["peak_memory_bytes"] for each in used_by_each),
            "memory": {"group_bytes": GROUP_BYTES, "devices": 1 if mesh is None else mesh.size},
            "plan": lines,
            "resumed_units": 0,
        }
        if processes.index == 0:
            samples = prepared.samples.samples if prepared.samples else None
            write_tree_outcome(folder, out.name, resolved_trees(recipe), samples, report)
            write_checksums(folder)
    return report


def _open(recipe: Recipe) -> _Plan:
    base = None if recipe.base_model is None else open_tree(recipe.base_model)
    inputs = Inputs([open_tree(entry.model) for entry in recipe.models], base)
    newest = inputs.newest
    places = place_leaves(newest.specs, recipe.tree, newest.name)
    for tree in inputs.all[:-1]:
        _check_alike(tree, place_leaves(tree.specs, recipe.tree, tree.name), newest, places)
        _check_packed(tree, newest, recipe.tree.root if recipe.tree else None)
    slices = slice_specs(newest.specs, places)
    if recipe.tree is None:  # otherwise its patterns order the stacks
        paths = (tuple(map(DictKey, name.split("/"))) for name in places)
        names = list(map(dotted_path, paths))
        check_layers(recipe.by_layer, names if stacks_of(names) else slices)
    return _Plan(inputs, places, slices)


def _check_alike(
    tree: TreeFile,
    tree_places: Mapping[str, Place],
    newest: TreeFile,
    newest_places: Mapping[str, Place],
) -> None:
    for name in sorted(newest.specs.keys() & tree.specs):
        expected_dtype, dtype = newest.specs[name].dtype, tree.specs[name].dtype
        if (name in newest_places) != (name in tree_places) and expected_dtype != dtype:
            raise InputError(
                f"{name} is {dtype} in {tree.name} and {expected_dtype} in {newest.name}: integers "
                "cannot be merged with floats"
            )
    extra = sorted(tree_places.keys() - newest_places)
    missing = sorted(newest_places.keys() - tree_places)
    if extra or missing:
        raise InputError(
            f"the trees have different leaves: only {tree.name} has "
            f"{', '.join(extra[:3]) or 'none'}; only {newest.name} has "
            f"{', '.join(missing[:3]) or 'none'}"
        )
    for name in newest_places:
        expected, shape = newest.specs[name].shape, tree.specs[name].shape
        if shape != expected:
            raise InputError(
                f"{name} has shape {list(shape)} in {tree.name} and {list(expected)} in "
                f"{newest.name}: merge trees of one shape"
            )


def _check_packed(tree: TreeFile, newest: TreeFile, root: str | None) -> None:
    """Raise InputError if weights that cannot be averaged differ under the root.

    These are 8-bit integers, which are quantised weights, and complex numbers. Wider integers are
    counts and random keys, and copied from the newest tree.
    """
    prefix = f"{root}/" if root else ""
    names = [
        name
        for name, spec in newest.specs.items()
        if name.startswith(prefix) and name in tree.specs
        if jnp.issubdtype(spec.dtype, jnp.complexfloating)
        or (spec.dtype.itemsize == 1 and jnp.issubdtype(spec.dtype, jnp.integer))
    ]
    expected, found = (read_leaves(each, names, {}) for each in (newest, tree))
    for name in names:
        if not np.array_equal(expected[name], found[name]):
            dtype = newest.specs[name].dtype
            what = "quantised weights cannot be averaged, dequantise them first"
            if dtype.kind == "c":
                what = "complex numbers are not merged, save real and imaginary parts separately"
            raise InputError(
                f"{name}, {dtype}, is not the same in {tree.name} and {newest.name}: {what}"
            )


def _merge(
    recipe: Recipe,
    plan: _Plan,
    prepared: Prepared,
    folder: Path,
    mesh: Mesh | None,
    progress: Progress,
) -> int:
    """Merge and write the tree, and return the bytes of its arrays."""
    method, newest = METHODS[recipe.merge_method], plan.inputs.newest
    values: dict[str, Values] = {}
    for unit in plan.units:
        values |= prepared.rule.values(unit, None)
    out_dtype = recipe.out_dtype or recipe.dtype
    written = 0

    def report_progress(name: str, done: int) -> None:
        read = sum(tree.bytes_read for tree in plan.inputs.all)
        progress(name, done, len(newest.specs), read=read, written=written)

    def counted(leaves: Iterator[tuple[str, Leaf]]) -> Iterator[tuple[str, Leaf]]:
        nonlocal written
        for name, leaf in leaves:
            written += leaf.nbytes
            yield name, leaf

    leaves = merge_leaves(
        plan.inputs,
        plan.places,
        values,
        kernel=method.kernel(recipe.parameters),
        reference=-1 if prepared.reference is None else prepared.reference,
        needs_full=lambda name: method.needs.full_tensors(name, plan.slices[name]),
        dtype=DTYPES[out_dtype] if out_dtype else None,
        mesh=mesh,
        report=report_progress,
    )
    write_tree(folder, newest, counted(leaves))
    report_progress("", len(newest.specs))
    return written


@contextmanager
def _output_folder(
    out: Path, force: bool, inputs: Collection[Path], processes: Processes
) -> Iterator[Path]:
    """Yield the folder that becomes `out`, the same in all processes."""
    if processes.count == 1:
        with output_folder(out, force=force, inputs=inputs) as folder:
            yield folder
        return
    with shared_work(out, processes, force=force, inputs=inputs) as work:
        yield work.folder
        processes.barrier("tree written")


def _describe(plan: _Plan, mesh: Mesh | None) -> str:
    """Describe the plan of a merge in a line."""
    units, newest = plan.units, plan.inputs.newest
    size = sum(spec.nbytes for tree in plan.inputs.all for spec in tree.specs.values()) / 1e6
    others = len(newest.specs) - len(plan.places)
    where = "" if mesh is None else f", over {mesh.size} devices"
    return (
        f"{len(plan.inputs.all)} trees of {len(plan.places)} leaves in {len(units)} units, "
        f"{units[0]} … {units[-1]} ({others} other leaves are {newest.name}'s): "
        f"{size:,.1f} MB to read{where}"
    )
