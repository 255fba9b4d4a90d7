"""The merge methods: each one's name, parameters, and what it needs.

A method merges one tensor at a time: its kernel takes the K models' arrays and weights (K,). To add
one, write its function, the equation in its docstring, in a file of this room, and give it a line
in `METHODS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
from pydantic import BaseModel, ConfigDict, Field, Strict

from recall_jax.merging.average import weighted_average, weighted_sum

Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Gradient = Annotated[list[Number], Field(min_length=1)]
Positive = Annotated[Number, Field(gt=0)]


class FilteredValue(BaseModel):
    """A value for the tensors whose name contains `filter`; "*" or none matches all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    filter: str | None = None
    value: Number | Gradient


# A number, a gradient over the layers, or the first match of a list of filters.
ParameterValue = Number | Gradient | Annotated[list[FilteredValue], Field(min_length=1)]


class Parameters(BaseModel):
    """A method's parameters; keys that it does not know are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # mergekit's memory option: accepted, and without effect on a float32 computation.
    int8_mask: Annotated[bool, Strict(), Field(exclude=True)] = False


class LinearParameters(Parameters):
    """`linear`: `weight` for models without one of their own; `normalize` divides by their sum."""

    weight: ParameterValue | None = None
    normalize: Annotated[bool, Strict()] = True


class LinearModelParameters(Parameters):
    """`linear`, for each model: its weight."""

    weight: ParameterValue | None = None


class RecallParameters(Parameters):
    """`recall`: how the models are compared, and the softmax temperature of the weights."""

    sigma: Positive | Literal["median", "dim"] = "median"
    temperature: Positive = 1.0
    reference: Annotated[int, Strict()] | str = "newest"
    similarity: str | dict[str, Positive] = "rbf"
    alignment: Literal["none", "center", "procrustes"] = "none"


# From the K arrays of a tensor and its weights (K,), with the keywords `reference` and `dtype`.
Kernel = Callable[..., jax.Array]


@dataclass(frozen=True)
class Method:
    """A merge method. `kernel` picks the function that merges a tensor, by the parameters."""

    kernel: Callable[[Any], Kernel]
    parameters: type[Parameters] = Parameters
    model_parameters: type[Parameters] = Parameters
    min_models: int = 1
    compares_models: bool = False


METHODS: dict[str, Method] = {
    "recall": Method(
        lambda parameters: weighted_average,
        parameters=RecallParameters,
        min_models=2,
        compares_models=True,
    ),
    "linear": Method(
        # Weights that sum to one keep what all models share exact.
        lambda parameters: weighted_average if parameters.normalize else weighted_sum,
        parameters=LinearParameters,
        model_parameters=LinearModelParameters,
    ),
    "average": Method(lambda parameters: weighted_average),
}
