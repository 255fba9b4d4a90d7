"""Merge by TIES: trim the task vectors, elect a sign for each element, and merge what agrees."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from pydantic import Strict

from recall_jax.engine.kernel import fixed
from recall_jax.engine.needs import Needs, always
from recall_jax.methods.method import Method
from recall_jax.methods.sparsify import keep_largest, rescaled
from recall_jax.methods.task_vectors import (
    TaskVectorModelParameters,
    TaskVectorParameters,
    add_to_base,
    task_vectors,
    weighted_vectors,
)


class TiesParameters(TaskVectorParameters):
    """Hold the parameters of `ties`."""

    normalize: Annotated[bool, Strict()] = True


def ties(
    models: Sequence[jax.Array],
    values: Mapping[str, jax.Array],
    *,
    base: jax.Array,
    reference: int = -1,
    dtype: DTypeLike,
    normalize: bool = True,
    rescale: bool = False,
) -> jax.Array:
    """Return B + lambda num / den over the elements of the elected sign (TIES, arXiv:2306.01708).

    S_i keeps the `density` (K,) of elements of largest magnitude in D_i = X_i - B; `rescale` gives
    it the L1 norm of D_i. The election, num and den are those of `weighted_vectors`. As in
    mergekit, each tensor is trimmed separately; the authors trim the model as one vector. `models`
    are K full tensors of one shape; `values` holds `weight` and `density` (K,), and `lambda_` ().
    """
    del reference
    vectors = task_vectors(models, base)
    trimmed = [
        jnp.where(keep_largest(vector, density), vector, 0)
        for vector, density in zip(vectors, values["density"], strict=True)
    ]
    if rescale:
        trimmed = [rescaled(kept, vector) for kept, vector in zip(trimmed, vectors, strict=True)]
    total = weighted_vectors(trimmed, values["weight"], normalize=normalize, consensus=True)
    return add_to_base(base, values["lambda_"] * total, dtype)


METHOD = Method(
    lambda parameters: fixed(ties, normalize=parameters.normalize, rescale=parameters.rescale),
    parameters=TiesParameters,
    model_parameters=TaskVectorModelParameters,
    needs=Needs(base=True, full_tensors=always, scratch=5),
    equation="θ = θ_base + λ Σₖ wₖ trim(θₖ − θ_base), of the elected signs",
)
