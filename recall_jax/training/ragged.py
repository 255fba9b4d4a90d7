"""Store rows of different lengths in one array, without a Python object for each row."""

from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_TYPES = {"i": np.int32, "b": np.int8}


class Ragged:
    """Hold n rows (T_i,), concatenated: `values` (T_0 + T_1 + …,), and the `ends` (n,) of rows."""

    def __init__(self, values: np.ndarray, ends: np.ndarray) -> None:
        """Use the arrays without copying them."""
        self.values = values
        self.ends = ends

    def __len__(self) -> int:
        """Return the number of rows n."""
        return len(self.ends)

    def __getitem__(self, row: int | np.integer) -> np.ndarray:
        """Return a view of one row, counted from 0."""
        return self.values[self.ends[row - 1] if row else 0 : self.ends[row]]

    def __iter__(self) -> Iterator[np.ndarray]:
        """Iterate over views of all rows, in order."""
        return map(self.__getitem__, range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Return the lengths of the rows, (n,) int64."""
        return np.diff(self.ends, prepend=0)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Ragged":
        """Return a copy of the rows with these indices, in this order."""
        taken = [self[row] for row in rows]
        ends = np.cumsum([len(row) for row in taken], dtype=np.int64)
        return Ragged(np.concatenate([self.values[:0], *taken]), ends)


class RaggedBuilder:
    """Collect rows for a `Ragged` of int32 ("i") or int8 ("b")."""

    def __init__(self, typecode: str) -> None:
        """Start with no row."""
        self._values, self._ends = array(typecode), array("q")

    def append(self, row: Iterable[int]) -> None:
        """Append one row."""
        self._values.extend(row)
        self._ends.append(len(self._values))

    @property
    def nbytes(self) -> int:
        """Return the bytes that the rows take so far."""
        return sum(each.itemsize * len(each) for each in (self._values, self._ends))

    def rows(self) -> Ragged:
        """Return all rows, without copying them; no row may be appended afterwards."""
        dtype = _TYPES[self._values.typecode]
        return Ragged(np.frombuffer(self._values, dtype), np.frombuffer(self._ends, np.int64))
