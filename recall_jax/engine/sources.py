"""Group the inputs of a merge: K models, and the base of methods that have one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)
S = TypeVar("S")


@dataclass(frozen=True)
class Inputs(Generic[T_co]):
    """Hold a value for each of the K models of a merge, the newest last, and for the base if any.

    A value is the model itself, its name, its tensors, or one tensor.
    """

    models: Sequence[T_co]
    base: T_co | None = None

    @property
    def all(self) -> list[T_co]:
        """Return the base, if there is one, and then the models, the newest last."""
        return [*([] if self.base is None else [self.base]), *self.models]

    @property
    def newest(self) -> T_co:
        """Return the last model's value."""
        return self.models[-1]

    def map(self, function: Callable[[T_co], S]) -> "Inputs[S]":
        """Return the results of `function` for each value."""
        base = None if self.base is None else function(self.base)
        return Inputs([function(model) for model in self.models], base)
