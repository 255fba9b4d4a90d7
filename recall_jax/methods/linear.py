"""Merge by a linear combination of the models, with the recipe's weights."""

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
    """Hold the parameters of `linear`; `normalize` divides the weights by their sum.

    `weight` is for models that have none.
    """

    weight: ParameterValue | None = None
    normalize: Annotated[bool, Strict()] = True

    def adjusted(self, values: Mapping[str, Any], tensor: str) -> dict[str, Any]:
        """Divide the weights by their sum; raises InputError if that is zero or not finite."""
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
    """Hold the parameters of `linear` for each model: its weight."""

    by_tensor = ("weight",)
    weight: ParameterValue | None = None


def linear_sum(
    models: Sequence[jax.Array],
    values: Mapping[str, jax.Array],
    *,
    base: jax.Array | None = None,
    reference: int = -1,
    dtype: DTypeLike,
) -> jax.Array:
    """Merge by `weighted_sum` with the value `weight` (K,)."""
    del base, reference
    return weighted_sum(models, values["weight"], dtype=dtype)


METHOD = Method(
    # With weights that sum to 1, elements on which all models agree stay exact.
    lambda parameters: average if parameters.normalize else linear_sum,
    parameters=LinearParameters,
    model_parameters=LinearModelParameters,
    equation="θ = Σₖ wₖ θₖ",
)
