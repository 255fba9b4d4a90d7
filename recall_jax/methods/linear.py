"""Linear: the sum of the models by weights of the recipe."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax.typing import DTypeLike
from pydantic import Strict

from recall_jax.errors import InputError
from recall_jax.methods.average import average, weighted_sum
from recall_jax.methods.method import Method
from recall_jax.methods.parameters import Parameters, ParameterValue


class LinearParameters(Parameters):
    """`linear`: `weight` for models without one of their own; `normalize` divides by their sum."""

    weight: ParameterValue | None = None
    normalize: Annotated[bool, Strict()] = True

    def adjusted(self, values: Mapping[str, Any], tensor: str) -> dict[str, Any]:
        """Divide the weights by their sum; InputError where that is zero or not finite."""
        if not self.normalize:
            return dict(values)
        with np.errstate(over="ignore"):
            total = values["weight"].sum()
        if abs(total) < 1e-8 or not np.isfinite(total):
            what = "sum to zero" if np.isfinite(total) else "have no finite sum"
            raise InputError(
                f"the weights of {tensor} {what}: change them, or set normalize: false"
            )
        return {**values, "weight": values["weight"] / total}


class LinearModelParameters(Parameters):
    """`linear`, for each model: its weight."""

    by_tensor = ("weight",)
    weight: ParameterValue | None = None


def total(
    models: Sequence[jax.Array],
    values: Mapping[str, jax.Array],
    *,
    base: jax.Array | None = None,
    reference: int = -1,
    dtype: DTypeLike,
) -> jax.Array:
    """The kernel of `weighted_sum`, by the value `weight` (K,)."""
    del base, reference
    return weighted_sum(models, values["weight"], dtype=dtype)


METHOD = Method(
    # Weights that sum to one keep what all models share exact.
    lambda parameters: average if parameters.normalize else total,
    parameters=LinearParameters,
    model_parameters=LinearModelParameters,
    equation="θ = Σₖ wₖ θₖ",
)
