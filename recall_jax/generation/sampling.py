"""Choose the next token from the logits: the most likely one, or a sample."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from recall_jax.errors import InputError

Array = jax.Array


@dataclass(frozen=True)
class Sampling:
    """Hold the temperature, 0 for the most likely token, and the filters of `filtered`."""

    temperature: float
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be 0 or a positive number, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not self.temperature and (self.top_k, self.top_p) != (None, None):
            raise InputError("top_k and top_p only apply to sampling: give a temperature above 0")


def choose(sampling: Sampling, logits: Array, keys: Array) -> Array:
    """Choose the next tokens, int32 (B,), from float32 logits (B, V) and keys (B,)."""
    if not sampling.temperature:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    left = filtered(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, left).astype(jnp.int32)


def filtered(logits: Array, top_k: int | None, top_p: float | None) -> Array:
    """Set logits (B, V) that may not be drawn to -inf, as transformers does.

    First all but the top_k most likely; then, of the remaining ones, all but the smallest set of
    the most likely whose probabilities sum to top_p (Holtzman et al. 2020, arXiv 1904.09751).
    Tokens as likely as the last one kept are all kept.
    """
    if top_k is None and top_p is None:
        return logits
    ranked = -jnp.sort(-logits, axis=-1)
    if top_k is not None:
        lowest = ranked[:, min(top_k, logits.shape[1]) - 1, None]
        ranked = jnp.where(ranked < lowest, -jnp.inf, ranked)
    if top_p is not None:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
        lowest = jnp.min(jnp.where(likelier < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < lowest, -jnp.inf, logits)
