"""The loss of a decoder on the tokens that a batch asks for."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from recall_jax.models.architecture import Architecture
from recall_jax.models.forward import Params, forward, logits
from recall_jax.models.lora import LoraSpec
from recall_jax.training.step import Batch

Array = jax.Array

_TOKENS_AT_ONCE = 128  # of each row, whose logits exist together


def completion_loss(
    arch: Architecture,
    params: Params,
    batch: Batch,
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
    lora: Params | None = None,
    lora_spec: LoraSpec | None = None,
    dropout_key: Array | None = None,
) -> tuple[Array, Array]:
    """Summed cross-entropy of the tokens of `loss_mask`, and their number; float32 scalars.

    The forward runs in `dtype`, whatever that of `params`; logits are float32. A row's first token
    follows nothing and never counts. With `remat`, blocks are computed again in the backward pass,
    so that only their inputs are kept. For the adapter's arguments see `forward`.
    """
    input_ids, attention_mask, loss_mask = map(jnp.asarray, batch)
    _, normed = forward(
        arch,
        params,
        input_ids,
        attention_mask,
        observe=lambda _: (),
        dtype=dtype,
        remat=remat,
        lora=lora,
        lora_spec=lora_spec,
        dropout_key=dropout_key,
    )
    # Predictions and their targets keep the length T, which blocks divide; the last predicts none.
    targets = jnp.roll(input_ids, -1, axis=1)
    counted = jnp.roll(loss_mask.at[:, 0].set(0), -1, axis=1).astype(jnp.float32)

    def summed(normed: Array, targets: Array, counted: Array) -> Array:
        scores = logits(arch, params, normed)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
        return jnp.sum(losses * counted)

    tokens = input_ids.shape[1]
    if tokens > _TOKENS_AT_ONCE and tokens % _TOKENS_AT_ONCE == 0:
        # Logits, (B, T, V), are the largest array of all: of a block of tokens at a time.
        blocks = tuple(map(_in_blocks, (normed, targets, counted)))
        losses = jax.lax.map(lambda block: jax.checkpoint(summed)(*block), blocks)
        return jnp.sum(losses), jnp.sum(counted)
    return summed(normed, targets, counted), jnp.sum(counted)


def _in_blocks(states: Array) -> Array:
    """(B, T, …) to (T / 128, B, 128, …)."""
    batch, _, *rest = states.shape
    return jnp.moveaxis(states.reshape(batch, -1, _TOKENS_AT_ONCE, *rest), 1, 0)
