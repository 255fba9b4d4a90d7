"""What the parameters of all merge methods have in common, and their values for a tensor.

Each method has a class of its own for them, and one for those of each model if there are some.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict

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
    """A method's parameters; keys that it does not know are refused.

    Those of `by_tensor` can differ between tensors: the rule gives the kernel their values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)
    by_tensor: ClassVar[tuple[str, ...]] = ()

    # mergekit's memory option: accepted, and without effect on a float32 computation.
    int8_mask: Annotated[bool, Strict(), Field(exclude=True)] = False

    def adjusted(self, values: Mapping[str, Any], tensor: str) -> dict[str, Any]:
        """Return the values of a tensor, float64, as the kernel is to get them; InputError."""
        del tensor
        return dict(values)

    def shares(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return how much each model counts in a tensor with these values: (K,) float64."""
        return np.asarray(values["weight"], np.float64)

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Return the parameters with models called by other names, old to new."""
        del names
        return self


def _fractions(value: ParameterValue | None) -> ParameterValue | None:
    """`value`, if all of its numbers are in [0, 1]."""
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, FilteredValue):
            _fractions(part.value)
        elif part is not None and not 0 <= part <= 1:
            raise ValueError(f"should be a share from 0 to 1, not {part}")
    return value


Share = Annotated[ParameterValue, AfterValidator(_fractions)]


def is_gradient(value: object) -> bool:
    """Whether a parameter's value, or that of one of its filters, is a list over the layers."""
    if not isinstance(value, list):
        return False
    return any(not isinstance(part, FilteredValue) or is_gradient(part.value) for part in value)


def parameter_at(value: ParameterValue, tensor: str, depth: float) -> float | None:
    """A parameter's value for one tensor, as mergekit reads it; None where no filter matches.

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
