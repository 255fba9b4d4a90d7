"""What a tensor on disk is, whichever format holds it: a dtype, a shape, and a way to read it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of one tensor."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes of the elements, C-contiguous."""
        return math.prod(self.shape) * self.dtype.itemsize


def shapes_of(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    """The shapes alone, by name."""
    return {name: spec.shape for name, spec in specs.items()}


class TensorSource(Protocol):
    """Named arrays on disk, read one at a time."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every tensor, in file order."""

    @property
    def bytes_read(self) -> int:
        """Bytes of the weight byte ranges asked for so far."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, C-contiguous, possibly a read-only view of the file; KeyError if unknown."""

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor along its first axis; a scalar is one row, (1,)."""

    def drop(self, name: str) -> None:
        """Tell the system that it need not keep the bytes of a tensor in its cache."""
