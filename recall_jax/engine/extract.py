"""Pooled states of rows of text by streamed models, in passes that fit a budget of memory."""

from collections.abc import Sequence

import numpy as np
from jax.typing import DTypeLike

from recall_jax.engine.budget import widest
from recall_jax.engine.cut import cut_rows
from recall_jax.engine.forward import StreamedForward
from recall_jax.engine.plan import NamedModel
from recall_jax.engine.progress import Progress, silent
from recall_jax.models.architecture import Architecture


def pooled_states(
    model: NamedModel,
    arch: Architecture,
    token_ids: Sequence[Sequence[int]],
    units: Sequence[str],
    *,
    batch_size: int,
    dtype: DTypeLike,
    budget: int,
    progress: Progress = silent,
) -> tuple[np.ndarray, int]:
    """Pooled states (U, n, E) float32 of the rows in `units`, and the passes it took.

    `units` are in the order of the forward pass, which ends with the last of them. A pass reads the
    model once, for as many rows as fit the budget of memory, in bytes.
    """
    batch_size, blocks, _ = cut_rows(
        arch,
        [len(ids) for ids in token_ids],
        num_units=len(units),
        batch_size=batch_size,
        itemsize=np.dtype(dtype).itemsize,
        stored=widest(model.specs),
        budget=budget,
    )
    pooled = []
    num_units = arch.units.index(units[-1]) + 1
    for done, rows in enumerate(blocks):
        forward = StreamedForward.of(
            arch, [token_ids[row] for row in rows], batch_size=batch_size, dtype=dtype
        )
        states = {}
        for index, (unit, means) in enumerate(forward.pooled_units(model, units[-1]), start=1):
            steps = done * num_units + index, len(blocks) * num_units
            progress(f"{model.name}: {unit}", *steps, read=model.bytes_read)
            if unit in units:
                states[unit] = means
        pooled.append(np.stack([states[unit] for unit in units]))
    return np.concatenate(pooled, axis=1), len(blocks)
