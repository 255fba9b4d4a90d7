"""OPCM's rule: one pass over the models for the scale of the sum, before the walk that writes it.

The scale is that of the whole merged model, so that nothing can be written before all is summed.
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from recall_jax.engine.budget import held_bytes
from recall_jax.engine.chunks import CHUNK
from recall_jax.engine.device import not_finite
from recall_jax.engine.plan import is_float, taken_whole
from recall_jax.engine.rules import Merge, Prepared, Values, values_by_tensor
from recall_jax.errors import InputError
from recall_jax.merging.opcm import sequential_sum
from recall_jax.merging.parameters import OpcmParameters


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
            arrays = [model.read(name) for model in merge.plan.inputs]
            for *models, base in _cut(arrays, is_whole="alpha" in values[name]):
                squares += np.asarray(_squares(models, values[name], base))
            if not np.isfinite(squares).all():
                faults = (
                    not_finite(model.name, {name: array})
                    for model, array in zip(merge.plan.inputs, arrays, strict=True)
                )
                told = next(filter(None, faults), f"tensor {name}: its changes overflow float32")
                raise InputError(told)
            if merge.plan.larger_than_memory:
                for model in merge.plan.inputs:
                    model.drop(name)
    *norms, total = np.sqrt(squares)
    return float(total / np.mean(norms)) if total else 1.0


def _cut(arrays: Sequence[np.ndarray], *, is_whole: bool) -> Iterator[Sequence[np.ndarray]]:
    """A tensor of all models and the base, as it is or in pieces; nothing where none is merged."""
    newest = arrays[-2]
    size = newest.size
    if not size or not is_float(newest.dtype):
        return
    if is_whole:
        yield arrays
        return
    for start in range(0, size, CHUNK):
        yield [array.reshape(-1)[start : start + CHUNK] for array in arrays]


@jax.jit
def _squares(models: list[jax.Array], values: Values, base: jax.Array) -> jax.Array:
    return sequential_sum(models, values, base)[1]
