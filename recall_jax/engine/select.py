"""Choose the typical samples, by k-means on the pooled states of one unit."""

from collections.abc import Sequence

import numpy as np
from jax.typing import DTypeLike

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.checkpoint.units import layer_unit
from recall_jax.engine.batching import Passes, fit_passes
from recall_jax.engine.budget import folded_bytes, widest
from recall_jax.engine.extract import pooled_states
from recall_jax.engine.layout import ON_HOST, Layout
from recall_jax.engine.memory import Split
from recall_jax.engine.plan import NamedModel
from recall_jax.errors import InputError, shown
from recall_jax.files.progress import Progress, silent
from recall_jax.inputs.settings import Samples
from recall_jax.models.architecture import Architecture
from recall_jax.representations.typical import Typical, select_typical


def clustered_units(unit: str | int, arch: Architecture) -> tuple[str, ...]:
    """Return the units to cluster, given "last", "all", the name of a unit, or an index.

    Raises InputError if the model does not have the unit.
    """
    if unit == "last":
        return (layer_unit(arch.num_hidden_layers - 1),)
    if unit == "all":
        return arch.units
    if unit in arch.units:
        return (str(unit),)
    if isinstance(unit, int) and -len(arch.units) <= unit < len(arch.units):
        return (arch.units[unit],)
    raise InputError(
        f"samples.unit {shown(unit)} is not a unit of this model: use last, all, {arch.units[0]}, "
        f"{arch.units[1]} … {arch.units[-1]}, or an index"
    )


def plan_selection(
    settings: Samples,
    lengths: Sequence[int],
    model: Checkpoint,
    arch: Architecture,
    *,
    dtype: DTypeLike,
    budget: int,
    split: Split | None = None,
) -> Passes | None:
    """Return the passes over `model` that choose typical rows among rows of these lengths.

    On a mesh, `split` says which part a device holds. Returns None if there is nothing to choose,
    because samples are given or all rows are typical. Raises InputError if the model does not have
    the unit to be clustered, and UnfinishedError if `budget` bytes are too few.
    """
    wanted = clustered_units(settings.unit, arch)
    if settings.typical is not None or len(lengths) <= settings.count:
        return None
    return fit_passes(
        arch,
        lengths,
        num_units=len(wanted),
        batch_size=settings.batch_size,
        itemsize=np.dtype(dtype).itemsize,
        stored_itemsize=widest(model.specs),
        budget=budget,
        overhead=folded_bytes([model]),
        split=split,
    )


def choose_typical(
    settings: Samples,
    token_ids: Sequence[Sequence[int]],
    model: NamedModel,
    arch: Architecture,
    *,
    passes: Passes,
    dtype: DTypeLike,
    layout: Layout = ON_HOST,
    progress: Progress = silent,
) -> Typical:
    """Return the typical rows of `token_ids`, by the model's pooled states in one unit or all."""
    wanted = clustered_units(settings.unit, arch)
    states = pooled_states(
        model,
        arch,
        token_ids,
        wanted,
        passes=passes,
        dtype=dtype,
        layout=layout,
        progress=progress,
    )
    points = np.concatenate(list(states), axis=1)  # (n, E), or (n, U E) for "all"
    points = points[_first_alike(token_ids)]
    return select_typical(points, settings.count, seed=settings.seed)


def _first_alike(token_ids: Sequence[Sequence[int]]) -> np.ndarray:
    """Return (n,), for each row, the first row with the same tokens.

    Equal rows in different batches may be rounded differently.
    """
    first: dict[bytes, int] = {}
    contents = (np.asarray(ids, np.int64).tobytes() for ids in token_ids)
    return np.asarray([first.setdefault(content, row) for row, content in enumerate(contents)])
