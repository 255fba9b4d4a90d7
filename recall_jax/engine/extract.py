"""Extract pooled states of text rows from a streamed model in passes that fit a memory budget."""

from collections.abc import Sequence

import numpy as np
from jax.typing import DTypeLike

from recall_jax.engine.batching import Passes
from recall_jax.engine.layout import ON_HOST, Layout
from recall_jax.engine.plan import NamedModel
from recall_jax.files.progress import Progress, silent
from recall_jax.models.architecture import Architecture


def pooled_states(
    model: NamedModel,
    arch: Architecture,
    token_ids: Sequence[Sequence[int]],
    units: Sequence[str],
    *,
    passes: Passes,
    dtype: DTypeLike,
    layout: Layout = ON_HOST,
    progress: Progress = silent,
) -> np.ndarray:
    """Return the pooled states (U, n, E) float32 of the n rows in U units.

    `units` are in the order of the forward pass, which stops after the last of them. Each pass
    reads the model once.
    """
    pooled = []
    num_units = arch.units.index(units[-1]) + 1
    for done, rows in enumerate(passes.rows):
        forward = layout.forward(
            arch,
            [token_ids[row] for row in rows],
            batch_size=min(passes.batch_size, len(rows)),
            dtype=dtype,
        )
        states = {}
        for index, (unit, means) in enumerate(forward.pooled_units(model, units[-1]), start=1):
            steps = done * num_units + index, len(passes.rows) * num_units
            progress(f"{model.name}: {unit}", *steps, read=model.bytes_read)
            if unit in units:
                states[unit] = means
        pooled.append(np.stack([states[unit] for unit in units]))
    places = np.argsort(np.concatenate(passes.rows))
    return np.concatenate(pooled, axis=1)[:, places]
