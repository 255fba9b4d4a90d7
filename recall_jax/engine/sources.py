"""The inputs of a merge: K models and the base that some methods merge them onto, in one order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)
S = TypeVar("S")


@dataclass(frozen=True)
class Inputs(Generic[T_co]):
    """The K models of a merge, the newest last, and their base if they have one.

    Also what each of them has: its name, its tensors, one tensor of that name.
    """

    models: Sequence[T_co]
    base: T_co | None = None

    @property
    def all(self) -> list[T_co]:
        """The base, if there is one, and then the models, the newest last."""
        return [*([] if self.base is None else [self.base]), *self.models]

    @property
    def newest(self) -> T_co:
        """The last of the models."""
        return self.models[-1]

    def map(self, function: Callable[[T_co], S]) -> "Inputs[S]":
        """Return what the function gives for each of them."""
        base = None if self.base is None else function(self.base)
        return Inputs([function(model) for model in self.models], base)
