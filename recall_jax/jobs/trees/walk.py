"""Provide trees on disk to merge methods, and run the user's forward on one model at a time."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.units import EMBED, HEAD
from recall_jax.engine.budget import held_bytes
from recall_jax.engine.inputs import TypicalSamples
from recall_jax.engine.merge import Merge, Prepared, Rule
from recall_jax.engine.plan import units_of
from recall_jax.engine.sources import Inputs
from recall_jax.errors import InputError, brief, running_user_code, shown
from recall_jax.inputs.samples import Tokenized, check_readers
from recall_jax.inputs.settings import Samples
from recall_jax.inputs.vocabularies import compare_vocabularies
from recall_jax.jobs.trees.files import TreeFile, nested, read_leaves
from recall_jax.jobs.trees.leaves import shardings_of
from recall_jax.jobs.trees.places import Place
from recall_jax.jobs.trees.samples import TreeSamples, batches_of, read_tree_samples
from recall_jax.recipes.recipe import Recipe
from recall_jax.representations.extract import ApplyFn, extract
from recall_jax.representations.typical import Typical, every_row, select_typical


@dataclass(frozen=True)
class TreeWalk:
    """Implement `engine.merge.Walk` for trees: the recipe's forward runs one model at a time.

    `specs` are those of the slices of all leaves, by name.
    """

    recipe: Recipe
    models: Sequence[TreeFile]
    places: Mapping[str, Place]
    specs: Mapping[str, TensorSpec]
    mesh: Mesh | None
    overhead: int = 0

    @cached_property
    def units(self) -> Mapping[str, Sequence[str]]:
        """Return the names of the slices of each unit, in the order of the forward pass."""
        return units_of(self.specs)

    def pooled(
        self, merge: Merge[Any, Any], selector: int, check: Callable[[int], None]
    ) -> "TreeStates":
        """Run each model once, over the devices of the mesh.

        The model `selector` runs first, and selects the typical samples; `check(n)` raises
        InputError if n are too few. Also raises InputError for faults of the forward or the
        samples.
        """
        settings, progress, recipe = merge.samples, merge.progress, self.recipe
        assert settings is not None and recipe.forward is not None
        units = list(self.units)
        forward = _Forward(
            load_forward(recipe.forward), recipe.forward, units, settings.batch_size, self.mesh
        )
        samples = read_tree_samples(settings)
        if settings.tokenizer is not None and isinstance(samples, Tokenized):
            _check_tokenizers(settings.tokenizer, merge.names, samples, merge.ignore_tokenizers)
        given = settings.typical is not None
        num_samples = len(samples.indices)
        check(num_samples if given else min(settings.count, num_samples))
        root = recipe.tree.root if recipe.tree else None
        reps: dict[int, np.ndarray] = {}
        typical: Typical | None = None
        for index in sorted(range(len(self.models)), key=lambda k: k != selector):
            model = self.models[index]
            progress(model.name, len(reps), len(self.models), note="forward")
            with progress.stage("read"):
                params = _parameters(model, self.places, root, self.mesh)
            if index == selector and not given:
                with progress.stage("select"):
                    typical = _choose(settings, forward, params, samples, model.name)
                    samples = samples.take(typical.rows)
            with progress.stage("forward"):
                reps[index] = forward.run(params, samples, model.name)
            del params  # freed before the next model is read
        states = np.stack([reps[index] for index in range(len(self.models))])
        return TreeStates(units, states, TypicalSamples(samples, typical, 0))


@dataclass(frozen=True)
class TreeStates:
    """Hold the pooled states (K, U, n, E) of all units in memory: `engine.merge.PooledStates`."""

    units: Sequence[str]
    states: np.ndarray
    samples: TypicalSamples[Any]

    def place(self, unit: str, stored: Inputs[Mapping[str, Any]]) -> None:
        """Do nothing: all units have been run."""

    def advance(self, unit: str, placed: Any) -> np.ndarray:
        """Return the pooled states (K, n, E) float32 of a unit."""
        del placed
        found: np.ndarray = self.states[:, self.units.index(unit)]
        return found

    def to_prepared(self, rule: Rule, reference: int | None = None) -> Prepared:
        """Return the rule ready for the merge, with its samples."""
        return Prepared(rule, held_bytes(), reference=reference, samples=self.samples)


def _check_tokenizers(
    reader: str, models: Sequence[str], samples: Tokenized, ignore_tokenizers: bool
) -> None:
    """Raise InputError if a model that has a tokenizer reads the samples differently."""
    folders = {name: [Path(name)] for name in (*models, reader)}
    check_readers(samples, [] if ignore_tokenizers else compare_vocabularies(reader, folders))


def load_forward(name: str) -> ApplyFn:
    """Import the function that `module:function` names, from Python's path or the current folder.

    This runs the user's module. Raises InputError if it cannot be imported, or has no such name.
    """
    module_name, _, path = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        with running_user_code(f"forward {name} cannot be imported"):
            found: Any = importlib.import_module(module_name)
    finally:
        sys.path.remove(here)
    for word in path.split("."):
        found = getattr(found, word, None)
    if not callable(found):
        raise InputError(f"forward {name}: {module_name} has no function {path}")
    apply_fn: ApplyFn = found
    return apply_fn


@dataclass(frozen=True)
class _Forward:
    """Run the user's function, and check its outputs."""

    apply_fn: ApplyFn
    name: str
    units: Sequence[str]
    batch_size: int
    mesh: Mesh | None

    def run(self, params: Any, samples: TreeSamples, model: str) -> np.ndarray:
        """Return the pooled states (U, n, E) float32 of the samples; messages name `model`."""
        batches, order = batches_of(samples, self.batch_size)
        what, units = f"forward {self.name}", self.units
        try:
            states = extract(self.apply_fn, params, batches, mesh=self.mesh)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error
        except Exception as error:  # the user's function may raise anything
            fault = f"{type(error).__name__}: {brief(error, 300)}"
            raise InputError(f"{what} fails on {model}: {fault}") from error
        if len(states) != len(units):
            raise InputError(
                f"{what} returns {len(states)} arrays, but by tree there are {len(units)} units: "
                f"return one for each of {units[0]} … {units[-1]}"
            )
        if not np.isfinite(states).all():
            raise InputError(f"{what} gives NaN or infinity on {model}: repair the model or it")
        return states[:, order]


def _choose(
    settings: Samples, forward: _Forward, params: Any, samples: TreeSamples, model: str
) -> Typical:
    rows = clustered_rows(settings.unit, forward.units)
    if len(samples.indices) <= settings.count:
        return every_row(len(samples.indices))
    points = np.concatenate(list(forward.run(params, samples, model)[rows]), axis=1)
    return select_typical(points, settings.count, seed=settings.seed)


def clustered_rows(unit: str | int, units: Sequence[str]) -> list[int]:
    """Return the indices of the units to cluster by: "last" (layer), "all", a name or an index.

    Raises InputError if there is no such unit.
    """
    if unit == "last":
        return [max(index for index, name in enumerate(units) if name not in (EMBED, HEAD))]
    if unit == "all":
        return list(range(len(units)))
    if unit in units:
        return [list(units).index(str(unit))]
    if isinstance(unit, int) and -len(units) <= unit < len(units):
        return [unit % len(units)]
    raise InputError(
        f"samples.unit {shown(unit)} is not a unit of this tree: use last, all, one of {units[0]} "
        f"… {units[-1]}, or an index"
    )


def _parameters(
    model: TreeFile, places: Mapping[str, Place], root: str | None, mesh: Mesh | None
) -> Any:
    """Read the parameters that the forward takes: all leaves under the root, as stored."""
    prefix = f"{root}/" if root else ""
    specs = {name: spec for name, spec in model.specs.items() if name.startswith(prefix)}
    leaves = read_leaves(model, list(specs), shardings_of(specs, places, mesh))
    return nested(model, leaves, root)
