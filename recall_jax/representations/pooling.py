"""Pool hidden states to one vector per sample and unit."""

import jax
import jax.numpy as jnp

from recall_jax.errors import InputError


def masked_mean(hidden: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    """Return the mean of `hidden` over the tokens in `attention_mask`, special tokens included.

    `hidden` is (B, T, E) of any float dtype and `attention_mask` (B, T), nonzero on real tokens;
    the result is (B, E) float32, zero for a row without tokens. A (B, E) `hidden` is already pooled
    and only cast. Raises InputError for other shapes, or if the mask is missing.
    """
    if hidden.ndim == 2:
        return hidden.astype(jnp.float32)
    if hidden.ndim != 3:
        raise InputError(
            f"apply_fn returned an array of shape {hidden.shape}; return (B, T, E) or (B, E)"
        )
    if attention_mask is None:
        raise InputError(
            "hidden states of shape (B, T, E) need a mask: give batches an 'attention_mask' "
            "or pass mask="
        )
    if attention_mask.shape != hidden.shape[:2]:
        raise InputError(
            f"the mask has shape {attention_mask.shape} but the hidden states {hidden.shape}; "
            "the first two dimensions must agree"
        )
    real = attention_mask.astype(bool)[:, :, None]
    # where, not a product: a padding position may have any value, even NaN.
    total = jnp.sum(jnp.where(real, hidden.astype(jnp.float32), 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(real, axis=1), 1).astype(jnp.float32)
