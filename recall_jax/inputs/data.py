"""Read some or all rows of a data file, within a memory budget."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.errors import InputError
from recall_jax.inputs.row_files import Columns, Row, count_rows, iterate_rows

_MIB = 1 << 20


def read_rows(path: Path, *, memory: int | None = None) -> list[Row]:
    """Read all rows of a file, as `iterate_rows` yields them.

    Raises InputError also if they take more than `memory` bytes.
    """
    return list(_within(memory, iterate_rows(path), path, "give fewer rows"))


def draw_rows(
    path: Path, pool: int, seed: int, *, columns: Columns | None = None, memory: int | None = None
) -> tuple[np.ndarray, list[Row]]:
    """Draw at most `pool` rows by `seed` without replacement.

    Returns ascending row numbers, and the rows. Only these rows are in memory, of Parquet only
    their `columns`, but the other rows are checked too. Raises InputError as `read_rows` does.
    """
    total = count_rows(path)
    chosen = draw_indices(total, pool, seed) if total > pool else None
    rows = iterate_rows(path, columns=columns, chosen=chosen)
    kept = list(_within(memory, rows, path, "draw fewer rows with samples.pool"))
    indices = np.arange(len(kept)) if chosen is None else chosen
    if len(kept) != min(total, pool):
        raise InputError(f"{path} was changed while it was read: start again")
    return indices, kept


def draw_indices(total: int, most: int, seed: int) -> np.ndarray:
    """Draw at most `most` of the numbers below `total` by `seed` without replacement, ascending."""
    if total <= most:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, most, replace=False))


def rows_at(path: Path, indices: np.ndarray) -> list[Row]:
    """Read the rows with these ascending numbers, with all their fields."""
    return list(iterate_rows(path, chosen=indices))


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines; values that JSON lacks, such as Parquet's dates, become text."""
    # A lone surrogate, which UTF-8 lacks, is written as JSON's escape.
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _within(memory: int | None, rows: Iterator[Row], path: Path, advice: str) -> Iterator[Row]:
    held = 0
    for row in rows:
        held += _bytes_of(row)
        if memory is not None and held > memory:
            raise InputError(
                f"the rows of {path} take more than the {memory / _MIB:,.0f} MiB of memory that "
                f"are left for them: allow more (--memory), or {advice}"
            )
        yield row


def _bytes_of(value: Any) -> int:
    """Return the memory that a value takes, with everything it contains."""
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        return size + sum(_bytes_of(each) for pair in value.items() for each in pair)
    return size + (sum(map(_bytes_of, value)) if isinstance(value, list) else 0)
