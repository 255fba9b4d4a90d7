"""Run the stages of RECALL separately; each writes a file that the next one reads.

`select` chooses typical samples (typical.jsonl), `extract` pools their hidden states (reps.npz),
`weigh` compares the models and computes their weights (weights.json), which a merge reads with
`--weights`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.checkpoint.npz import NpzTree
from recall_jax.checkpoint.units import unit_names
from recall_jax.engine.batching import fit_passes
from recall_jax.engine.budget import folded_bytes, memory_budget, widest
from recall_jax.engine.extract import pooled_states
from recall_jax.engine.findings import report_entries
from recall_jax.engine.inputs import (
    TypicalSamples,
    common_architecture,
    compute_dtype,
    find_typical,
    read_samples,
)
from recall_jax.engine.layout import ON_HOST, Layout
from recall_jax.engine.plan import open_models
from recall_jax.engine.select import plan_selection
from recall_jax.errors import InputError
from recall_jax.files.progress import Progress, silent
from recall_jax.inputs.settings import Samples
from recall_jax.methods.recall import RecallParameters, compare_representations, recall_comparison
from recall_jax.similarity.diagnostics import similarity_warnings


@dataclass(frozen=True)
class Representations:
    """Hold pooled states of K models, `reps` (K, U, n, E) float32, their data rows, and names."""

    reps: np.ndarray
    rows: np.ndarray
    units: tuple[str, ...]
    models: tuple[str, ...]


def select(
    model: str,
    samples: Samples,
    *,
    dtype_name: str | None = None,
    ignore_config: Collection[str] = (),
    memory: int | None = None,
    layout: Layout = ON_HOST,
    progress: Progress = silent,
) -> TypicalSamples:
    """Choose typical samples by one model's hidden states.

    `memory` is the budget in bytes, by default a share of free memory. Raises InputError for faults
    of the model or the samples, or if the budget is too small.
    """
    models = open_models([model])
    arch = common_architecture(models, ignore_config)
    dtype = compute_dtype(dtype_name, models[0])
    pool = read_samples(samples, models[0], models, arch, budget=memory)
    lengths = [len(ids) for ids in pool.token_ids]
    budget = memory_budget(memory)
    passes = plan_selection(
        samples, lengths, models[0], arch, dtype=dtype, budget=budget, split=layout.split(1)
    )
    return find_typical(
        samples,
        pool,
        models[0],
        arch,
        passes=passes,
        dtype=dtype,
        layout=layout,
        progress=progress,
    )


def extract(
    specs: Sequence[str],
    samples: Samples,
    *,
    dtype_name: str | None = None,
    ignore_config: Collection[str] = (),
    ignore_tokenizers: bool = False,
    memory: int | None = None,
    layout: Layout = ON_HOST,
    progress: Progress = silent,
) -> Representations:
    """Return the pooled states of every unit of K models for all rows that `samples` names.

    `memory` is the budget in bytes, by default a share of free memory; rows are split into as many
    passes as it requires. Raises InputError for faults of the models or the samples, or if the
    budget is too small.
    """
    models = open_models(specs)
    arch = common_architecture(models, ignore_config)
    tokenized = read_samples(
        samples,
        models[-1],
        models,
        arch,
        ignore_tokenizers=ignore_tokenizers,
        budget=memory,
    )
    dtype = compute_dtype(dtype_name, models[-1])
    passes = fit_passes(
        arch,
        [len(ids) for ids in tokenized.token_ids],
        num_units=len(arch.units),
        batch_size=samples.batch_size,
        itemsize=np.dtype(dtype).itemsize,
        stored_itemsize=max(widest(model.specs) for model in models),
        budget=memory_budget(memory),
        overhead=max(folded_bytes([model]) for model in models),
        split=layout.split(1),
    )
    states = [
        pooled_states(
            model,
            arch,
            tokenized.token_ids,
            arch.units,
            passes=passes,
            dtype=dtype,
            layout=layout,
            progress=progress,
        )
        for model in models
    ]
    return Representations(np.stack(states), tokenized.indices, arch.units, tuple(specs))


def weigh(representations: Representations, parameters: RecallParameters) -> dict[str, Any]:
    """Compute RECALL's weights from representations, and return the record in `weights.json`.

    The weights are a softmax over the models of their similarities, for each unit (arXiv
    2510.20479).
    """
    comparison = recall_comparison(parameters, representations.models)
    reference = comparison.reference_index
    units = list(representations.units)
    found = compare_representations(
        representations.reps, comparison, parameters.weighing, units=units
    )
    return {
        "format": 1,
        "method": "recall",
        "models": list(representations.models),
        "reference": reference,
        "units": units,
        "typical_samples": representations.rows.tolist(),
        **report_entries(found),
        "warnings": similarity_warnings(found.similarity, units, reference),
        "settings": parameters.model_dump(mode="json"),
    }


def save_representations(path: Path, representations: Representations) -> None:
    """Write an .npz file with the arrays `reps`, `rows`, `units` and `models`."""
    with path.open("wb") as file:
        np.savez(
            file,
            reps=representations.reps,
            rows=representations.rows,
            units=np.asarray(representations.units),
            models=np.asarray(representations.models),
        )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return all arrays of an .npz file, without unpickling; InputError if it is invalid."""
    file = NpzTree(str(path), path)
    return {name: file.read(name) for name in file.specs}


def load_representations(path: Path) -> Representations:
    """Read an .npz file with at least `reps` (K, U, n, E); InputError if it is not one."""
    arrays = read_arrays(path)
    reps = arrays.get("reps")
    if (
        reps is None
        or reps.ndim != 4
        or reps.shape[1] < 3
        or 0 in reps.shape
        or reps.dtype.kind != "f"
    ):
        found = "none" if reps is None else f"{reps.dtype} {reps.shape}"
        raise InputError(f"{path} needs reps (K, U, n, E) of floats, U >= 3; it has {found}")
    if not np.isfinite(reps).all():
        raise InputError(f"{path}: reps holds NaN or infinite values")
    num_models, num_units, num_rows, _ = reps.shape
    rows = arrays.get("rows", np.arange(num_rows))
    units = arrays.get("units", np.asarray(unit_names(num_units - 2)))
    models = arrays.get("models", np.asarray([f"model {k}" for k in range(num_models)]))
    for name, array, kinds, length in (
        ("rows", rows, "iu", num_rows),
        ("units", units, "U", num_units),
        ("models", models, "U", num_models),
    ):
        if array.shape != (length,) or array.dtype.kind not in kinds:
            raise InputError(f"{path}: {name} is {array.dtype} {array.shape}, reps needs {length}")
    if rows[0] < 0 or (np.diff(rows) <= 0).any() or len(set(units)) < num_units:
        raise InputError(f"{path}: rows must ascend from 0 up, and units differ")
    return Representations(
        reps.astype(np.float32),
        rows.astype(np.int64),
        tuple(map(str, units)),
        tuple(map(str, models)),
    )
