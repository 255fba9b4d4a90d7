"""Provide AdamW and learning rate schedules in float32, as in transformers' Trainer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

Array = jax.Array
Schedule = Callable[[ArrayLike], Array]

SCHEDULES = ("constant", "linear", "cosine")
_DECAYED = ("kernel", "embedding", "a", "b")  # matrices, not biases or scales of norms


def learning_rate(peak: float, schedule: str, steps: int, warmup_steps: int) -> Schedule:
    """Return a function from a step, counted from 0, to its learning rate, float32.

    The rate rises linearly from 0 to `peak` over `warmup_steps`; then it is constant, or falls to 0
    at `steps`, linearly or along half a cosine.
    """

    def rate(step: ArrayLike) -> Array:
        step = jnp.asarray(step, jnp.float32)
        rising = step / max(warmup_steps, 1)
        done = jnp.clip((step - warmup_steps) / max(steps - warmup_steps, 1), 0.0, 1.0)
        falling = {
            "constant": jnp.ones_like(done),
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
        }[schedule]
        return peak * jnp.where(step < warmup_steps, rising, falling)

    return rate


def adamw(
    rate: Schedule, *, weight_decay: float = 0.0, clip_norm: float | None = None
) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov and Hutter 2019) with b1 0.9, b2 0.999, eps 1e-8.

    Gradients are first clipped by their global norm; only matrices decay.
    """
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    decay = optax.add_decayed_weights(weight_decay, mask=_is_decayed)
    return optax.chain(clip, _scale_by_adam(), decay, optax.scale_by_learning_rate(rate))


def _scale_by_adam() -> optax.GradientTransformation:
    """Return optax's Adam with a float32 step count: b ** count then needs no type promotion."""
    adam = optax.scale_by_adam()

    def init(params: Any) -> optax.OptState:
        return adam.init(params)._replace(count=jnp.float32(0))

    return optax.GradientTransformation(init, adam.update)


def _is_decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _DECAYED, params)
