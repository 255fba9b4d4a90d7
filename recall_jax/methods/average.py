"""Average K arrays of one shape in float32, rounded once to the output dtype."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from recall_jax.methods.method import Method
from recall_jax.methods.parameters import Parameters


def average(
    models: Sequence[jax.Array],
    values: Mapping[str, jax.Array],
    *,
    base: jax.Array | None = None,
    reference: int = -1,
    dtype: DTypeLike,
) -> jax.Array:
    """Merge by `weighted_average` with the value `weight` (K,)."""
    del base
    return weighted_average(models, values["weight"], reference=reference, dtype=dtype)


def weighted_average(
    models: Sequence[jax.Array], weights: jax.Array, *, reference: int = -1, dtype: DTypeLike
) -> jax.Array:
    """Return theta_N + sum over k != N of w_k (theta_k - theta_N), for weights that sum to 1.

    `models` are K arrays of one shape, N the reference; `weights` is (K,) float32, or (K, ...)
    broadcastable to them. The result has their shape and `dtype`. Where all models agree, the
    reference's element is passed on bit for bit.
    """
    original = models[reference]
    anchor = original.astype(jnp.float32)
    moved = jnp.zeros_like(anchor)
    equal = jnp.ones(anchor.shape, bool)
    for index, model in enumerate(models):
        if index != reference % len(models):
            wide = model.astype(jnp.float32)
            moved += weights[index] * (wide - anchor)
            equal &= model == original if model.dtype == original.dtype else wide == anchor
    # Adding zero would turn -0.0 into 0.0, and may flush subnormals.
    return jnp.where(equal, original.astype(dtype), (anchor + moved).astype(dtype))


def weighted_sum(models: Sequence[jax.Array], weights: jax.Array, *, dtype: DTypeLike) -> jax.Array:
    """Return sum over k of w_k theta_k, for weights of any sum; shapes as in `weighted_average`."""
    total = jnp.zeros(models[0].shape, jnp.float32)
    for index, model in enumerate(models):
        total += weights[index] * model.astype(jnp.float32)
    return total.astype(dtype)


METHOD: Method[Parameters, Parameters] = Method(lambda parameters: average, equation="θ = Σₖ wₖ θₖ")
