"""Define what the parameters of all merge methods share, and their values for a tensor.

Each method has a class for its parameters, and another for those of each model, if there are any.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict

Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Gradient = Annotated[list[Number], Field(min_length=1)]
Positive = Annotated[Number, Field(gt=0)]


class FilteredValue(BaseModel):
    """Hold a value for the tensors whose name contains `filter`; "*" or None matches all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    filter: str | None = None
    value: Number | Gradient


# A number, a gradient over the layers, or the first match of a list of filters.
ParameterValue = Number | Gradient | Annotated[list[FilteredValue], Field(min_length=1)]


class Parameters(BaseModel):
    """Hold a method's parameters; unknown keys are refused.

    The parameters in `by_tensor` can differ between tensors, and are values of the kernel.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)
    by_tensor: ClassVar[tuple[str, ...]] = ()

    # mergekit's memory option, accepted without effect: everything is computed in float32.
    int8_mask: Annotated[bool, Strict(), Field(exclude=True)] = False

    def adjusted(self, values: Mapping[str, Any], tensor: str) -> dict[str, Any]:
        """Return the kernel's values for a tensor, given those of the recipe in float64.

        Raises InputError if they are not valid together.
        """
        del tensor
        return dict(values)

    def shares(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return how much each model counts in a tensor with these values: (K,) float64."""
        return np.asarray(values["weight"], np.float64)

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Return the parameters with models renamed from old to new names."""
        del names
        return self


def _fractions(value: ParameterValue | None) -> ParameterValue | None:
    """Return `value` if all of its numbers are in [0, 1]; else raise ValueError."""
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, FilteredValue):
            _fractions(part.value)
        elif part is not None and not 0 <= part <= 1:
            raise ValueError(f"should be a share from 0 to 1, not {part}")
    return value


Share = Annotated[ParameterValue, AfterValidator(_fractions)]


def is_gradient(value: object) -> bool:
    """Return whether a parameter's value, or that of one of its filters, is a list by layer."""
    if not isinstance(value, list):
        return False
    return any(not isinstance(part, FilteredValue) or is_gradient(part.value) for part in value)


def parameter_at(value: ParameterValue, tensor: str, depth: float) -> float | None:
    """Return a parameter's value for one tensor, as mergekit does; None if no filter matches.

    A list of numbers is a gradient over the layers, interpolated at `depth` in [0, 1]: layer i of L
    is at i / (L - 1), the embedding at 0, the head at 1 (mergekit gives both the first value).
    """
    if isinstance(value, list):
        if value and isinstance(value[0], FilteredValue):
            for entry in value:
                assert isinstance(entry, FilteredValue)
                if entry.filter in (None, "*") or entry.filter in tensor:
                    return parameter_at(entry.value, tensor, depth)
            return None
        points = np.linspace(0.0, 1.0, len(value))
        return float(np.interp(depth, points, np.asarray(value, np.float64)))
    return float(value)
