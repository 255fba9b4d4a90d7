"""OPCM's rule: one pass over the models for the scale of the sum, before the walk that writes it.

The scale is that of the whole merged model, so that nothing can be written before all is summed.
"""

from collections.abc import Sequence

import jax
import numpy as np

from recall_jax.checkpoint.dtypes import is_float
from recall_jax.engine.budget import held_bytes
from recall_jax.engine.plan import taken_whole
from recall_jax.engine.rules import Merge, Prepared, Values, values_by_tensor
from recall_jax.errors import InputError
from recall_jax.methods.opcm import sequential_sum
from recall_jax.methods.parameters import OpcmParameters


def prepare_opcm(merge: Merge) -> Prepared:
    """Norms of all task vectors and of their sequential sum, or the scale from the journal."""
    parameters = merge.recipe.parameters
    assert isinstance(parameters, OpcmParameters)
    linear = taken_whole("linear", merge.plan.specs)
    alpha = {"alpha": np.float32(parameters.alpha)}
    values: dict[str, Values] = {name: alpha if name in linear else {} for name in merge.plan.specs}
    if merge.journal.prepared is None:
        merge.journal.record_prepared({"lambda": _scale(merge, values)})
    assert merge.journal.prepared is not None
    scale = np.float32(merge.journal.prepared["lambda"])
    weight = np.full(len(merge.models), 1 / scale, np.float32)
    scaled = {name: {**own, "lambda_": scale, "weight": weight} for name, own in values.items()}
    return Prepared(
        values_by_tensor(scaled, merge.plan.specs), merge.models, held_bytes() + merge.beside
    )


def _scale(merge: Merge, values: dict[str, Values]) -> float:
    """lambda: the norm of the sum over the mean norm of the task vectors, of the whole models."""
    squares = np.zeros(len(merge.models) + 1)
    units = merge.plan.units
    for done, (unit, names) in enumerate(units.items()):
        read = sum(model.bytes_read for model in merge.plan.inputs)
        merge.progress(f"first pass: {unit}", done, len(units), read=read, written=0)
        for name in names:
            spec, is_whole = merge.plan.specs[name], "alpha" in values[name]
            if not is_float(spec.dtype) or not spec.nbytes:
                continue  # none is merged
            stored = [merge.layout.read(model, name) for model in merge.plan.inputs]
            *models, base = stored
            squares += merge.layout.summed(
                _squares, models, values[name], spec, base=base, whole=is_whole
            )
            if not np.isfinite(squares).all():
                told = merge.layout.fault([model.name for model in merge.plan.inputs], name, stored)
                raise InputError(told or f"tensor {name}: its changes overflow float32")
            if merge.plan.larger_than_memory:
                for model in merge.plan.inputs:
                    model.drop(name)
    *norms, total = np.sqrt(squares)
    return float(total / np.mean(norms)) if total else 1.0


def _squares(models: Sequence[jax.Array], values: Values, base: jax.Array) -> jax.Array:
    return sequential_sum(models, values, base)[1]
