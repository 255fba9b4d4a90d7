"""Compute the cross-entropy of next tokens from the final norm's output."""

import jax
import jax.numpy as jnp
import optax

from recall_jax.models.architecture import Architecture
from recall_jax.models.forward import Params, logits

Array = jax.Array

TOKENS_AT_ONCE = 128
"""Logits are computed for this many tokens of each row at a time."""


def next_token_loss(
    arch: Architecture, params: Params, normed: Array, input_ids: Array, counted: Array
) -> tuple[Array, Array]:
    """Return the summed cross-entropy, in nats, of the counted tokens, and their number.

    `normed` (B, T, E) is the final norm's output for `input_ids` (B, T); tokens count where
    `counted` (B, T) is 1, except a row's first, which has no prediction. `params` need only hold
    the output projection. Both results are float32 scalars; logits are float32, and recomputed in a
    backward pass.
    """
    # Predictions and targets keep length T, which blocks divide; the last predicts nothing.
    targets = jnp.roll(input_ids, -1, axis=1)
    counted = jnp.roll(counted.at[:, 0].set(0), -1, axis=1).astype(jnp.float32)

    def summed(normed: Array, targets: Array, counted: Array) -> Array:
        scores = logits(arch, params, normed)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
        return jnp.sum(losses * counted)

    tokens = input_ids.shape[1]
    if tokens > TOKENS_AT_ONCE and tokens % TOKENS_AT_ONCE == 0:
        # Logits (B, T, V) are the largest array: compute them for one block of tokens at a time.
        blocks = tuple(map(in_blocks, (normed, targets, counted)))
        losses = jax.lax.map(lambda block: jax.checkpoint(summed)(*block), blocks)
        return jnp.sum(losses), jnp.sum(counted)
    return summed(normed, targets, counted), jnp.sum(counted)


def in_blocks(states: Array) -> Array:
    """Reshape (B, T, …) to (T / 128, B, 128, …)."""
    batch, _, *rest = states.shape
    return jnp.moveaxis(states.reshape(batch, -1, TOKENS_AT_ONCE, *rest), 1, 0)
