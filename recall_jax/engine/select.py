"""Choosing the typical samples: k-means over one unit's pooled states."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from recall_jax.engine.extract import pooled_states
from recall_jax.engine.plan import NamedModel
from recall_jax.engine.progress import Progress, silent
from recall_jax.errors import InputError
from recall_jax.models.architecture import Architecture
from recall_jax.representations.typical import Typical, every_row, select_typical
from recall_jax.units import layer_unit


def clustered_units(unit: str | int, arch: Architecture) -> tuple[str, ...]:
    """The units whose pooled states are clustered: "last", "all", a unit's name or index."""
    if unit == "last":
        return (layer_unit(arch.num_hidden_layers - 1),)
    if unit == "all":
        return arch.units
    if unit in arch.units:
        return (str(unit),)
    if isinstance(unit, int) and -len(arch.units) <= unit < len(arch.units):
        return (arch.units[unit],)
    raise InputError(
        f"samples.unit {unit!r} is no unit of this model: use last, all, {arch.units[0]}, "
        f"{arch.units[1]} … {arch.units[-1]}, or an index"
    )


def choose_typical(
    model: NamedModel,
    arch: Architecture,
    token_ids: Sequence[Sequence[int]],
    *,
    count: int,
    unit: str | int = "last",
    seed: int = 0,
    batch_size: int = 8,
    dtype: DTypeLike = jnp.float32,
    budget: int,
    progress: Progress = silent,
) -> tuple[Typical, int]:
    """Typical rows among `token_ids` by the model's pooled states of `unit`: (rows, passes).

    With no more rows than clusters all are typical, after no pass.
    """
    wanted = clustered_units(unit, arch)
    if len(token_ids) <= count:
        return every_row(len(token_ids)), 0
    states, passes = pooled_states(
        model,
        arch,
        token_ids,
        wanted,
        batch_size=batch_size,
        dtype=dtype,
        budget=budget,
        progress=progress,
    )
    points = np.concatenate(list(states), axis=1)  # (n, E), or (n, U E) for "all"
    return select_typical(points, count, seed=seed), passes
