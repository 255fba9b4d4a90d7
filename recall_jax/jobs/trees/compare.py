"""RECALL on trees on disk: the user's forward runs one model after the other."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from recall_jax.checkpoint.units import EMBED, HEAD
from recall_jax.engine.findings import Findings, compare_representations
from recall_jax.engine.rules import recall_comparison
from recall_jax.errors import InputError, shown
from recall_jax.files.progress import Clock, Progress, silent
from recall_jax.inputs.samples import Tokenized, check_readers
from recall_jax.inputs.settings import Samples
from recall_jax.inputs.vocabularies import compare_vocabularies
from recall_jax.jobs.trees.files import TreeFile, nested, read_leaves
from recall_jax.jobs.trees.leaves import shardings_of
from recall_jax.jobs.trees.places import Place
from recall_jax.jobs.trees.samples import TreeSamples, batches_of, read_tree_samples
from recall_jax.methods.parameters import RecallParameters
from recall_jax.recipes.recipe import Recipe
from recall_jax.representations.extract import ApplyFn, extract
from recall_jax.representations.typical import Typical, every_row, select_typical
from recall_jax.similarity.compare import check_samples


@dataclass(frozen=True)
class Compared:
    """The weights of a recall merge, and the samples that they come from.

    `typical` is None where the samples were given.
    """

    found: Findings
    samples: TreeSamples
    typical: Typical | None
    reference: int | None


def compare_trees(
    recipe: Recipe,
    models: Sequence[TreeFile],
    places: Mapping[str, Place],
    units: Sequence[str],
    *,
    mesh: Mesh | None,
    clock: Clock,
    progress: Progress = silent,
) -> Compared:
    """RECALL's weights for these units, by the recipe's forward on its samples.

    Each model is held once, over the devices of the mesh; the reference first, which chooses the
    typical samples. Raises InputError where forward or samples do not fit.
    """
    assert isinstance(recipe.parameters, RecallParameters)
    assert recipe.samples is not None and recipe.forward is not None
    settings, names = recipe.samples, [entry.model for entry in recipe.models]
    comparison = recall_comparison(recipe.parameters, names)
    reference = comparison.reference_index
    chooser = len(models) - 1 if reference is None else reference
    forward = _Forward(
        load_forward(recipe.forward), recipe.forward, units, settings.batch_size, mesh
    )
    samples = read_tree_samples(settings)
    if settings.tokenizer is not None and isinstance(samples, Tokenized):
        _check_tokenizers(settings.tokenizer, names, samples, recipe.ignore_tokenizers)
    check_samples(
        len(samples.indices) if settings.typical else min(settings.count, len(samples.indices)),
        comparison,
    )
    root = recipe.tree.root if recipe.tree else None
    reps: dict[int, np.ndarray] = {}
    typical: Typical | None = None
    for index in sorted(range(len(models)), key=lambda k: k != chooser):
        model = models[index]
        progress(model.name, len(reps), len(models), note="forward")
        with clock.stage("read"):
            params = _parameters(model, places, root, mesh)
        if index == chooser and settings.typical is None:
            with clock.stage("select"):
                typical = _choose(settings, forward, params, samples, model.name)
                samples = samples.take(typical.rows)
        with clock.stage("forward"):
            reps[index] = forward.run(params, samples, model.name)
        del params  # before the next model is read
    found = compare_representations(
        np.stack([reps[index] for index in range(len(models))]),
        comparison,
        recipe.parameters.weighing,
        units=list(units),
    )
    return Compared(found, samples, typical, reference)


def _check_tokenizers(
    reader: str, models: Sequence[str], samples: Tokenized, ignore_tokenizers: bool
) -> None:
    """Raise InputError where the samples are other texts to a model that has a tokenizer."""
    folders = {name: [Path(name)] for name in (*models, reader)}
    check_readers(samples, [] if ignore_tokenizers else compare_vocabularies(reader, folders))


def load_forward(name: str) -> ApplyFn:
    """The function that `module:function` names, from where Python looks and the current folder.

    This runs the user's own module. InputError where it cannot be imported, or has no such name.
    """
    module_name, _, path = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does
        raise InputError(f"forward {name} cannot be imported: {_said(error)}") from error
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
    """The user's function, and what it is run on and held to."""

    apply_fn: ApplyFn
    name: str
    units: Sequence[str]
    batch_size: int
    mesh: Mesh | None

    def run(self, params: Any, samples: TreeSamples, model: str) -> np.ndarray:
        """(U, n, E) float32 of the samples in their order; `model` is for messages."""
        batches, order = batches_of(samples, self.batch_size)
        what, units = f"forward {self.name}", self.units
        try:
            states = extract(self.apply_fn, params, batches, mesh=self.mesh)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error
        except Exception as error:  # of the user's function
            raise InputError(f"{what} fails on {model}: {_said(error)}") from error
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
    """Which units are clustered: "last" (the last layer), "all", a unit's name or index."""
    if unit == "last":
        return [max(index for index, name in enumerate(units) if name not in (EMBED, HEAD))]
    if unit == "all":
        return list(range(len(units)))
    if unit in units:
        return [list(units).index(str(unit))]
    if isinstance(unit, int) and -len(units) <= unit < len(units):
        return [unit % len(units)]
    raise InputError(
        f"samples.unit {shown(unit)} is no unit of this tree: use last, all, one of {units[0]} … "
        f"{units[-1]}, or an index"
    )


def _parameters(
    model: TreeFile, places: Mapping[str, Place], root: str | None, mesh: Mesh | None
) -> Any:
    """What the forward takes: all under the root, as stored."""
    prefix = f"{root}/" if root else ""
    specs = {name: spec for name, spec in model.specs.items() if name.startswith(prefix)}
    leaves = read_leaves(model, list(specs), shardings_of(specs, places, mesh))
    return nested(model, leaves, root)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
