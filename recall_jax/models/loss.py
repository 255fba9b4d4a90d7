"""The cross-entropy of next tokens, from the final norm's output."""

import jax
import jax.numpy as jnp
import optax

from recall_jax.models.architecture import Architecture
from recall_jax.models.forward import Params, logits

Array = jax.Array

TOKENS_AT_ONCE = 128
"""So many tokens of each row have logits at a time."""


def next_token_loss(
    arch: Architecture, params: Params, normed: Array, input_ids: Array, counted: Array
) -> tuple[Array, Array]:
    """Summed cross-entropy, in nats, of the tokens where `counted` is 1, and their number; float32.

    `normed` (B, T, E) is the final norm's output on `input_ids` (B, T); `params` need hold no more
    than the output projection. A row's first token follows nothing and never counts. Logits are
    float32, and in a backward pass computed again.
    """
    # Predictions and their targets keep the length T, which blocks divide; the last predicts none.
    targets = jnp.roll(input_ids, -1, axis=1)
    counted = jnp.roll(counted.at[:, 0].set(0), -1, axis=1).astype(jnp.float32)

    def summed(normed: Array, targets: Array, counted: Array) -> Array:
        scores = logits(arch, params, normed)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
        return jnp.sum(losses * counted)

    tokens = input_ids.shape[1]
    if tokens > TOKENS_AT_ONCE and tokens % TOKENS_AT_ONCE == 0:
        # Logits, (B, T, V), are the largest array of all: of a block of tokens at a time.
        blocks = tuple(map(in_blocks, (normed, targets, counted)))
        losses = jax.lax.map(lambda block: jax.checkpoint(summed)(*block), blocks)
        return jnp.sum(losses), jnp.sum(counted)
    return summed(normed, targets, counted), jnp.sum(counted)


def in_blocks(states: Array) -> Array:
    """(B, T, …) to (T / 128, B, 128, …)."""
    batch, _, *rest = states.shape
    return jnp.moveaxis(states.reshape(batch, -1, TOKENS_AT_ONCE, *rest), 1, 0)
