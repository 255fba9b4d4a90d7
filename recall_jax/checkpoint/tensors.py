"""Define a tensor on disk in any format: its dtype and shape, and how to read it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class TensorSpec:
    """Hold the dtype and shape of one tensor."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the size in bytes of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def shapes_of(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by name."""
    return {name: spec.shape for name, spec in specs.items()}


class TensorSource(Protocol):
    """Define a reader of named arrays on disk."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the dtype and shape of every tensor, in file order."""

    @property
    def bytes_read(self) -> int:
        """Return the number of weight bytes read so far."""

    def read(self, name: str) -> np.ndarray:
        """Read one tensor, C-contiguous, possibly a read-only view; KeyError if unknown."""

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows `start` to `stop` along the first axis; a scalar is one row, (1,)."""

    def drop(self, name: str) -> None:
        """Tell the system that it need not cache the bytes of a tensor."""
