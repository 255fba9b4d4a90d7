"""Merge by MagMax: of each parameter, the change of largest magnitude (arXiv:2407.06322)."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from pydantic import Field

from recall_jax.engine.kernel import fixed
from recall_jax.engine.needs import Needs
from recall_jax.methods.method import Method
from recall_jax.methods.parameters import Parameters, ParameterValue
from recall_jax.methods.task_vectors import add_to_base, task_vectors


class MagMaxParameters(Parameters):
    """Hold the parameters of `magmax`."""

    by_tensor = ("lambda_",)
    lambda_: ParameterValue = Field(1.0, alias="lambda")


def magmax(
    models: Sequence[jax.Array],
    values: Mapping[str, jax.Array],
    *,
    base: jax.Array,
    reference: int = -1,
    dtype: DTypeLike,
) -> jax.Array:
    """Return B + lambda D, where D is elementwise the D_i = X_i - B of largest magnitude.

    Of two changes of equal magnitude the positive one is taken; the authors' code takes the later
    model's, which makes the result depend on the order. They merge models that were fine-tuned one
    from the other, with lambda = 0.5 in their scripts. `models` are K arrays of one shape; `values`
    holds `lambda_` ().
    """
    del reference
    vectors = task_vectors(models, base)
    highest, lowest = vectors[0], vectors[0]
    for vector in vectors[1:]:
        highest, lowest = jnp.maximum(highest, vector), jnp.minimum(lowest, vector)
    largest = jnp.where(highest >= -lowest, highest, lowest)
    return add_to_base(base, values["lambda_"] * largest, dtype)


METHOD: Method[MagMaxParameters, Parameters] = Method(
    lambda parameters: fixed(magmax),
    parameters=MagMaxParameters,
    needs=Needs(base=True),
    equation="θ = θ_base + λ (θₖ − θ_base), each element of the k where it is largest",
)
