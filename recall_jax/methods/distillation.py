"""Compute the distillation loss: how far a merged model is from each of its teachers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from recall_jax.inputs.batches import make_batches
from recall_jax.models.architecture import Architecture
from recall_jax.models.forward import Params, forward, logits
from recall_jax.models.loss import TOKENS_AT_ONCE, in_blocks
from recall_jax.representations.pooling import masked_mean

Array = jax.Array


@dataclass(frozen=True)
class Match:
    """Weigh the terms of the distance to a teacher, which `refine` defines."""

    kl: float = 0.0
    js: float = 1.0
    hidden: float = 0.0
    temperature: float = 1.0


class DistillationBatches(NamedTuple):
    """Hold S batches of B rows of one padded length, each with the outputs of one teacher.

    `input_ids` and `attention_mask` are (S, B, T) int32; `teacher` (S,) int32 indexes the models;
    `normed` (S, B, T, E) is its final norm's output, and `pooled` (S, U, B, E) float32 its pooled
    states. `token_weight` (S,) and `state_weight` (S, U) float32 weigh the distance of a token's
    distribution, and the squared distance of a pooled state, in the loss.
    """

    input_ids: Any
    attention_mask: Any
    teacher: Any
    normed: Any
    pooled: Any
    token_weight: Any
    state_weight: Any


def pooled_states_in_memory(
    arch: Architecture,
    params: Params,
    token_ids: Sequence[Sequence[int]],
    batch_size: int,
    dtype: DTypeLike,
) -> np.ndarray:
    """Return the pooled states (U, n, E) float32 of a model in memory, on n rows of token ids."""
    placed = jax.device_put(params)
    batches = make_batches(token_ids, min(batch_size, len(token_ids)))
    means = [
        np.asarray(_teacher_outputs(arch, placed, *batch, dtype)[1]) for batch in batches.batches
    ]
    return np.concatenate(means, axis=1)[:, batches.order]


def make_distillation_batches(
    arch: Architecture,
    models: Sequence[Params],
    samples: Sequence[Sequence[Sequence[int]]],
    anchor: float,
    batch_size: int,
    dtype: DTypeLike,
) -> list[DistillationBatches]:
    """Return the batches of all samples, grouped by padded length, with their teachers' outputs.

    `samples` holds the token ids of each teacher's rows, the base first, which `anchor` weighs.
    """
    batch_size = min(batch_size, max(map(len, samples)))
    found: dict[int, list[DistillationBatches]] = {}
    for teacher, rows in enumerate(samples):
        share = anchor if teacher == 0 else 1 / (len(models) - 1)
        if not rows or not share:
            continue
        batches = make_batches(rows, batch_size).batches
        outputs = [_teacher_outputs(arch, models[teacher], *batch, dtype) for batch in batches]
        squares = sum(np.sum(np.square(pooled), axis=(1, 2)) for _, pooled in outputs)  # (U,)
        weights = np.float32(share / sum(map(len, rows))), (share / squares).astype(np.float32)
        for batch, (normed, pooled) in zip(batches, outputs, strict=True):
            one = DistillationBatches(*batch, np.int32(teacher), normed, pooled, *weights)
            found.setdefault(batch.input_ids.shape[1], []).append(one)
    return [_stacked(group) for group in found.values()]


@jax.jit
def _stacked(group: list[DistillationBatches]) -> DistillationBatches:
    return jax.tree.map(lambda *each: jnp.stack(each), *group)


@partial(jax.jit, static_argnames=("arch", "dtype"))
def _teacher_outputs(
    arch: Architecture, params: Params, ids: Array, mask: Array, dtype: DTypeLike
) -> tuple[Array, Array]:
    """Return the final norm's output (B, T, E) and the pooled states (U, B, E) float32."""
    pooled, normed = forward(
        arch, params, ids, mask, observe=lambda hidden: masked_mean(hidden, mask), dtype=dtype
    )
    return normed, jnp.stack(pooled)


def teacher_distance(
    arch: Architecture,
    match: Match,
    merged: Params,
    teacher: Params,
    batch: DistillationBatches,
    *,
    dtype: DTypeLike,
) -> Array:
    """Return the weighted distance () float32 of the merged model to a batch's teacher.

    `teacher` holds the unit with its output projection; its states are in the batch.
    """
    mask = batch.attention_mask
    pooled, normed = forward(
        arch,
        merged,
        batch.input_ids,
        mask,
        observe=lambda hidden: masked_mean(hidden, mask) if match.hidden else (),
        dtype=dtype,
        remat=True,
    )

    def summed(merged_states: Array, teacher_states: Array, counts: Array) -> Array:
        ours, theirs = (
            jax.nn.log_softmax(logits(arch, params, states) / match.temperature)
            for params, states in ((merged, merged_states), (teacher, teacher_states))
        )
        return jnp.sum(_divergence(match, theirs, ours) * counts)

    parts = (normed, batch.normed, mask.astype(jnp.float32))
    if mask.shape[1] > TOKENS_AT_ONCE:  # one block of tokens at a time, as in training
        blocks = tuple(map(in_blocks, parts))
        divergence = jnp.sum(jax.lax.map(lambda block: jax.checkpoint(summed)(*block), blocks))
    else:
        divergence = summed(*parts)
    total = batch.token_weight * match.temperature**2 * divergence
    if match.hidden:
        squares = jnp.sum((jnp.stack(pooled) - batch.pooled) ** 2, axis=(1, 2))  # (U,)
        total += match.hidden * jnp.mean(batch.state_weight * squares)
    return total


def _divergence(match: Match, theirs: Array, ours: Array) -> Array:
    """Return the weighted divergence (…) of log-probabilities (…, V)."""

    def kl(p: Array, q: Array) -> Array:
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    total = jnp.zeros(theirs.shape[:-1], jnp.float32)
    if match.kl:
        total += match.kl * kl(theirs, ours)
    if match.js:
        middle = jnp.logaddexp(theirs, ours) - jnp.log(jnp.float32(2))
        total += match.js * (kl(theirs, middle) + kl(ours, middle)) / 2
    return total
