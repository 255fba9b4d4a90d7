"""What a tensor on disk is, whichever format holds it: a dtype, a shape, and a way to read it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

# The element types we read and write, by their names in a safetensors header.
DTYPE_OF_NAME: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
NAME_OF_DTYPE: Mapping[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPE_OF_NAME.items()}


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
