"""Compute the loss of a streamed model on the counted tokens of a few rows."""

from collections.abc import Sequence
from contextlib import closing
from functools import partial

import jax
import numpy as np
from jax.typing import DTypeLike

from recall_jax.checkpoint.units import EMBED, HEAD, LM_HEAD
from recall_jax.engine.background import prefetch
from recall_jax.engine.device import find_not_finite
from recall_jax.engine.forward import HiddenStates, StreamedForward
from recall_jax.engine.plan import NamedModel
from recall_jax.errors import InputError
from recall_jax.models.architecture import Architecture
from recall_jax.models.convert import state_tensors, unit_params
from recall_jax.models.loss import next_token_loss


def mean_loss(
    model: NamedModel,
    arch: Architecture,
    token_ids: Sequence[Sequence[int]],
    counted: Sequence[Sequence[int]],
    *,
    batch_size: int,
    dtype: DTypeLike,
) -> float:
    """Return the mean cross-entropy in nats of the tokens of all rows for which `counted` is 1.

    The first token of a row has no context and never counts. Memory holds one unit of the model and
    the next one, and the output projection at the end. The forward runs in `dtype`; logits are
    float32. Raises InputError if the loss is not finite.
    """
    forward = StreamedForward.prepare(arch, token_ids, batch_size=batch_size, dtype=dtype)
    normed = _last_states(forward, model)
    unit = EMBED if arch.tie_word_embeddings else HEAD
    projection = state_tensors(arch, EMBED)[0] if arch.tie_word_embeddings else LM_HEAD
    names = {*state_tensors(arch, unit), projection}
    tensors = {name: model.read(name) for name in names}
    total = number = 0.0
    masks = _masks(forward, counted)
    for states, input_ids, mask in zip(normed, forward.input_ids, masks, strict=True):
        summed, tokens = _loss(arch, unit, tensors, states, input_ids, mask)
        total, number = total + float(summed), number + float(tokens)
    if not np.isfinite(total):
        raise InputError(
            find_not_finite(model.name, tensors)
            or f"{model.name}: its logits overflow, though the weights that make them are finite"
        )
    return total / number


def _last_states(forward: StreamedForward, model: NamedModel) -> HiddenStates:
    """Return the final norm's output, reading the model one unit at a time."""
    arch = forward.arch

    def read(unit: str) -> tuple[str, dict[str, np.ndarray]]:
        return unit, {name: model.read(name) for name in state_tensors(arch, unit)}

    states: Sequence[HiddenStates] = ()
    with closing(prefetch(read, arch.units)) as coming:
        for unit, tensors in coming:
            placed = forward.place(unit, [tensors])
            states, _ = forward.advance(unit, placed, states, [model.name])
    return states[0]


def _masks(forward: StreamedForward, counted: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return the masks of counted tokens of each batch, int32 (B, T)."""
    masks = [np.zeros(ids.shape, np.int32) for ids in forward.input_ids]
    for place, row in zip(forward.batches.order, counted, strict=True):
        batch, slot = divmod(int(place), len(masks[0]))
        masks[batch][slot, : len(row)] = row
    return masks


@partial(jax.jit, static_argnames=("arch", "unit"))
def _loss(
    arch: Architecture,
    unit: str,
    tensors: dict[str, jax.Array],
    states: jax.Array,
    input_ids: jax.Array,
    mask: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    params = {unit: unit_params(arch, unit, tensors)}
    return next_token_loss(arch, params, states[0], input_ids, mask)
