"""A merge of JAX trees, from recipe to finished folder."""

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
from recall_jax.engine.pod.together import shared_work
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
    """The trees, and where their leaves stand; `slices` are the units' parts by their names."""

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
    """Carry out a recipe whose models are JAX trees: `out` becomes a tree like the newest.

    Leaves are spread over the devices of the mesh, if there is one, and each is read, merged and
    forgotten; the merged tree is held until it is written. With several processes all must call
    this. Returns the report, as `recall_report.json` holds it. Raises InputError for whatever is
    wrong with the recipe, the trees, the forward, the data or `out`.
    """
    clock, lines = Clock(), []

    def tell(line: str) -> None:
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
        tell(_describe(plan, mesh))
    read_paths = [*inputs, *input_paths(recipe, plan.inputs.all)]
    with _place(out, force, read_paths, processes) as folder:
        with clock.stage("total"):
            walk = TreeWalk(recipe, plan.inputs.models, plan.places, plan.slices, mesh)
            journal, reporter = MergeJournal(None, {}), Reporter(progress, clock, tell)
            prepared = prepare(recipe, walk, journal, reporter)
            with clock.stage("merge"):
                written = _merge(recipe, plan, prepared, folder, mesh, progress)
        report = make_report(
            recipe, prepared, [tree.name for tree in plan.inputs.models], plan.units
        )
        read = sum(tree.bytes_read for tree in plan.inputs.all)
        own = {"read": read, "peak_memory_bytes": peak_memory_bytes()}
        took = processes.exchange("took", own)
        report |= {
            "tree": {"format": FORMATS[type(newest)], "leaves": len(plan.places)},
            "timing_s": clock.seconds,
            "bytes": {"read": sum(each["read"] for each in took), "written": written},
            "peak_memory_bytes": max(each["peak_memory_bytes"] for each in took),
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
    if recipe.tree is None:  # else it says in which order stacks follow one another
        paths = (tuple(map(DictKey, name.split("/"))) for name in places)
        names = list(map(dotted_path, paths))
        check_layers(recipe.by_layer, names if stacks_of(names) else slices)
    return _Plan(inputs, places, slices)


def _check_alike(
    tree: TreeFile, its: Mapping[str, Place], newest: TreeFile, places: Mapping[str, Place]
) -> None:
    for name in sorted(newest.specs.keys() & tree.specs):
        kind, its_kind = newest.specs[name].dtype, tree.specs[name].dtype
        if (name in places) != (name in its) and kind != its_kind:
            raise InputError(
                f"{name} is {its_kind} in {tree.name} and {kind} in {newest.name}: integers cannot "
                "be merged with floats"
            )
    only_here, only_there = sorted(its.keys() - places), sorted(places.keys() - its)
    if only_here or only_there:
        raise InputError(
            f"the trees have different leaves: only {tree.name} has "
            f"{', '.join(only_here[:3]) or 'none'}; only {newest.name} has "
            f"{', '.join(only_there[:3]) or 'none'}"
        )
    for name in places:
        mine, other = newest.specs[name].shape, tree.specs[name].shape
        if mine != other:
            raise InputError(
                f"{name} has shape {list(other)} in {tree.name} and {list(mine)} in "
                f"{newest.name}: merge trees of one shape"
            )


def _check_packed(tree: TreeFile, newest: TreeFile, root: str | None) -> None:
    """Raise InputError where weights of which no mean is taken differ under the root.

    Those are integers of 8 bits, as quantised weights are, and complex numbers. Wider integers are
    counts and random keys, and the newest's.
    """
    prefix = f"{root}/" if root else ""
    names = [
        name
        for name, spec in newest.specs.items()
        if name.startswith(prefix) and name in tree.specs
        if jnp.issubdtype(spec.dtype, jnp.complexfloating)
        or (spec.dtype.itemsize == 1 and jnp.issubdtype(spec.dtype, jnp.integer))
    ]
    mine, its = (read_leaves(each, names, {}) for each in (newest, tree))
    for name in names:
        if not np.array_equal(mine[name], its[name]):
            dtype = newest.specs[name].dtype
            what = "quantised weights cannot be averaged, dequantise them first"
            if dtype.kind == "c":
                what = "complex numbers are not merged, save real and imaginary part apart"
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
    """Merge and write the tree; the bytes of its arrays."""
    method, newest = METHODS[recipe.merge_method], plan.inputs.newest
    values: dict[str, Values] = {}
    for unit in plan.units:
        values |= prepared.rule.values(unit, None)
    out_dtype = recipe.out_dtype or recipe.dtype
    written = 0

    def tell(name: str, done: int) -> None:
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
        whole=lambda name: method.needs.whole(name, plan.slices[name]),
        dtype=DTYPES[out_dtype] if out_dtype else None,
        mesh=mesh,
        hear=tell,
    )
    write_tree(folder, newest, counted(leaves))
    tell("", len(newest.specs))
    return written


@contextmanager
def _place(
    out: Path, force: bool, inputs: Collection[Path], processes: Processes
) -> Iterator[Path]:
    """The folder that becomes `out`, the same for all processes."""
    if processes.count == 1:
        with output_folder(out, force=force, inputs=inputs) as folder:
            yield folder
        return
    with shared_work(out, processes, force=force, inputs=inputs) as work:
        yield work.folder
        processes.barrier("tree written")


def _describe(plan: _Plan, mesh: Mesh | None) -> str:
    """The plan of a merge in a line."""
    units, newest = plan.units, plan.inputs.newest
    size = sum(spec.nbytes for tree in plan.inputs.all for spec in tree.specs.values()) / 1e6
    others = len(newest.specs) - len(plan.places)
    where = "" if mesh is None else f", over {mesh.size} devices"
    return (
        f"{len(plan.inputs.all)} trees of {len(plan.places)} leaves in {len(units)} units, "
        f"{units[0]} … {units[-1]} ({others} other leaves are {newest.name}'s): "
        f"{size:,.1f} MB to read{where}"
    )
