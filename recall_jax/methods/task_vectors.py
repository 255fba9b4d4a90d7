"""Compute task vectors, the changes of K fine-tunes to their base, and add their sum to it."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from pydantic import Field, Strict

from recall_jax.methods.parameters import Parameters, ParameterValue, Share

# Sums of a few float32 products count as zero if smaller than this, relative to their terms.
_ROUNDING = 2.0**-20


class TaskVectorModelParameters(Parameters):
    """Hold each model's parameters in methods of task vectors: its weight and its density."""

    by_tensor = ("weight", "density")
    weight: ParameterValue | None = None
    density: Share | None = None


class TaskVectorParameters(Parameters):
    """Hold the parameters of methods of task vectors, with defaults for each model's.

    `normalize` divides by the sum of the weights; `rescale` gives a sparse task vector its original
    L1 norm. Methods that make nothing sparse accept `density` and `rescale`, and ignore them.
    """

    by_tensor = ("lambda_",)
    weight: ParameterValue | None = None
    density: Share = 1.0
    normalize: Annotated[bool, Strict()] = False
    rescale: Annotated[bool, Strict()] = False
    lambda_: ParameterValue = Field(1.0, alias="lambda")

    def shares(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return how much each task vector counts in elements that all keep: (K,) float64."""
        weight = super().shares(values)
        total = weight.sum() if self.normalize else 1.0
        divisor = total if abs(total) > 1e-6 * abs(weight).sum() else 1
        return np.asarray(values["lambda_"] * weight / divisor)


def task_vectors(models: Sequence[jax.Array], base: jax.Array) -> list[jax.Array]:
    """Return D_i = X_i - B in float32, for K models and their base, all of one shape."""
    return [model.astype(jnp.float32) - base.astype(jnp.float32) for model in models]


def add_to_base(base: jax.Array, update: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return B + update, in float32 and rounded once to `dtype`; where update is 0, B's bits."""
    # Adding zero would turn -0.0 into 0.0, and may flush subnormals.
    moved = (base.astype(jnp.float32) + update).astype(dtype)
    return jnp.where(update == 0, base.astype(dtype), moved)


def weighted_vectors(
    vectors: Sequence[jax.Array], weights: jax.Array, *, normalize: bool, consensus: bool
) -> jax.Array:
    """Return the weighted sum of K vectors S_i of one shape, with weights w (K,) and W_i = w_i S_i.

        num = sum M_i W_i      den = sum M_i w_i, 1 where that is zero

    The sum is num / den if `normalize`, else num. M_i is 1, or with `consensus` [sign W_i = s],
    where s is the elected sign of the element: +1 if sum W_i >= 0, else -1 (TIES,
    arXiv:2306.01708). Sums within float32's rounding of zero count as zero, so that neither an
    election nor a quotient depends on the order of the models.
    """
    weighted = [weight * vector for weight, vector in zip(weights, vectors, strict=True)]
    if consensus:
        against = sum(weighted) < -_ROUNDING * sum(jnp.abs(each) for each in weighted)
        # NaN agrees with either sign, so that it is kept and reported.
        agrees = [jnp.where(against, ~(each >= 0), ~(each <= 0)) for each in weighted]
        weighted = [jnp.where(a, each, 0) for a, each in zip(agrees, weighted, strict=True)]
    else:
        agrees = [jnp.ones((), bool) for _ in weighted]
    total = sum(weighted)
    if normalize:
        taken = [jnp.where(a, weight, 0) for a, weight in zip(agrees, weights, strict=True)]
        divisor = sum(taken)
        is_zero = jnp.abs(divisor) <= _ROUNDING * sum(jnp.abs(each) for each in taken)
        total = total / jnp.where(is_zero, 1, divisor)
    return total
