"""Rows of different lengths in one array, which is all the memory that they take."""

from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_TYPES = {"i": np.int32, "b": np.int8}


class Ragged:
    """n rows (T_i,) laid end to end: `values` (T_0 + T_1 + …,), and the `ends` (n,) of the rows."""

    def __init__(self, values: np.ndarray, ends: np.ndarray) -> None:
        """Rows that are there."""
        self.values = values
        self.ends = ends

    def __len__(self) -> int:
        """Number of rows n."""
        return len(self.ends)

    def __getitem__(self, row: int | np.integer) -> np.ndarray:
        """A view of one row, counted from 0."""
        return self.values[self.ends[row - 1] if row else 0 : self.ends[row]]

    def __iter__(self) -> Iterator[np.ndarray]:
        """All rows in order."""
        return map(self.__getitem__, range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64."""
        return np.diff(self.ends, prepend=0)

    def take(self, places: Sequence[int] | np.ndarray) -> "Ragged":
        """The rows at these places, in this order."""
        rows = [self[place] for place in places]
        ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        return Ragged(np.concatenate([self.values[:0], *rows]), ends)


class Growing:
    """Rows on their way into a `Ragged` of int32 ("i") or int8 ("b")."""

    def __init__(self, kind: str) -> None:
        """No row yet."""
        self._values, self._ends = array(kind), array("q")

    def append(self, row: Iterable[int]) -> None:
        """One more row."""
        self._values.extend(row)
        self._ends.append(len(self._values))

    @property
    def nbytes(self) -> int:
        """What the rows take by now."""
        return sum(each.itemsize * len(each) for each in (self._values, self._ends))

    def rows(self) -> Ragged:
        """All of them, in the memory that they have; none is added after that."""
        dtype = _TYPES[self._values.typecode]
        return Ragged(np.frombuffer(self._values, dtype), np.frombuffer(self._ends, np.int64))
