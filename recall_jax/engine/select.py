"""Choosing the typical samples: one streamed pass over the newest model for each block of rows."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from recall_jax.checkpoint.tensors import TensorSource
from recall_jax.engine.forward import StreamedForward, hidden_bytes
from recall_jax.errors import InputError
from recall_jax.models.architecture import Architecture
from recall_jax.representations.batches import make_batches
from recall_jax.representations.typical import Typical, select_typical
from recall_jax.units import layer_unit

# Hidden states of the rows of one pass, beside which the kernel needs room for a unit.
HIDDEN_BUDGET = 4 << 30


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
    model: TensorSource,
    arch: Architecture,
    token_ids: Sequence[Sequence[int]],
    *,
    count: int,
    unit: str | int = "last",
    seed: int = 0,
    batch_size: int = 8,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Typical, int]:
    """Typical rows among `token_ids` by the model's pooled states of `unit`: (rows, passes).

    A pass reads the model once, up to the clustered unit, for as many rows as fit the budget of
    hidden states; with no more rows than clusters all are typical, after no pass.
    """
    wanted = clustered_units(unit, arch)
    if len(token_ids) <= count:
        return Typical(np.arange(len(token_ids))), 0
    blocks = _row_blocks(arch, token_ids, batch_size)
    points = np.concatenate(
        [
            _pooled(model, arch, [token_ids[row] for row in block], wanted, batch_size, dtype)
            for block in blocks
        ]
    )
    return select_typical(points, count, seed=seed), len(blocks)


def _pooled(
    model: TensorSource,
    arch: Architecture,
    token_ids: Sequence[Sequence[int]],
    wanted: Sequence[str],
    batch_size: int,
    dtype: DTypeLike,
) -> np.ndarray:
    """Pooled states of the wanted units side by side, (n, E) or (n, U E)."""
    forward = StreamedForward.of(arch, make_batches(token_ids, batch_size), dtype)
    pooled = []
    for unit, means in forward.pooled_units(model):
        if unit in wanted:
            pooled.append(means)
        if unit == wanted[-1]:
            break
    return np.concatenate(pooled, axis=1)


def _row_blocks(
    arch: Architecture, token_ids: Sequence[Sequence[int]], batch_size: int
) -> list[np.ndarray]:
    """Rows in as many equal blocks as keep one block's hidden states in the budget."""
    total = hidden_bytes(arch, make_batches(token_ids, batch_size))
    return np.array_split(np.arange(len(token_ids)), max(1, -(-total // HIDDEN_BUDGET)))
