"""Task vectors: what K fine-tunes have added to their base, summed, and put onto it again."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from pydantic import Field, Strict

from recall_jax.methods.parameters import Parameters, ParameterValue, Share

# Sums of a few float32 products that are smaller than this, beside their terms, are zero.
_ROUNDING = 2.0**-20


class TaskVectorModelParameters(Parameters):
    """Methods of task vectors, for each model: its weight, and the share of elements it keeps."""

    by_tensor = ("weight", "density")
    weight: ParameterValue | None = None
    density: Share | None = None


class TaskVectorParameters(Parameters):
    """Methods of task vectors: what is theirs, and `weight` and `density` of models without.

    `normalize` divides by the sum of the weights, `rescale` gives a sparse task vector its L1 norm
    from before. Where nothing is made sparse, `density` and `rescale` are accepted and do nothing.
    """

    by_tensor = ("lambda_",)
    weight: ParameterValue | None = None
    density: Share = 1.0
    normalize: Annotated[bool, Strict()] = False
    rescale: Annotated[bool, Strict()] = False
    lambda_: ParameterValue = Field(1.0, alias="lambda")

    def shares(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return how much each task vector counts, of elements that all models keep."""
        weight = super().shares(values)
        total = weight.sum() if self.normalize else 1.0
        divisor = total if abs(total) > 1e-6 * abs(weight).sum() else 1
        return np.asarray(values["lambda_"] * weight / divisor)


def task_vectors(models: Sequence[jax.Array], base: jax.Array) -> list[jax.Array]:
    """D_i = X_i - B in float32, for K models and their base, all of one shape."""
    return [model.astype(jnp.float32) - base.astype(jnp.float32) for model in models]


def add_to_base(base: jax.Array, update: jax.Array, dtype: DTypeLike) -> jax.Array:
    """B + update in float32, rounded once to `dtype`; where nothing is added, B bit for bit."""
    # Adding zero would turn -0.0 into 0.0, and may flush subnormals.
    moved = (base.astype(jnp.float32) + update).astype(dtype)
    return jnp.where(update == 0, base.astype(dtype), moved)


def weighted_vectors(
    vectors: Sequence[jax.Array], weights: jax.Array, *, normalize: bool, consensus: bool
) -> jax.Array:
    """The weighted sum of K vectors S_i of one shape, weights w (K,): with W_i = w_i S_i,

        num = sum M_i W_i      den = sum M_i w_i, 1 where that is zero

    num / den if `normalize`, else num. M_i is 1, or with `consensus` it is [sign W_i = s], where s
    is the elected sign of the element: +1 if sum W_i >= 0, else -1 (TIES, arXiv 2306.01708). Sums
    within float32's rounding of zero count as zero, so that neither an election nor a quotient
    hangs on the order of the models.
    """
    weighted = [weight * vector for weight, vector in zip(weights, vectors, strict=True)]
    if consensus:
        against = sum(weighted) < -_ROUNDING * sum(jnp.abs(each) for each in weighted)
        # NaN agrees with either sign, so that it comes out and is told.
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
