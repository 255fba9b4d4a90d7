"""Data files: rows of text, as many as are asked for, within a budget of memory."""

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
    """All rows of a file, as `iterate_rows` gives them.

    Raises InputError too where they take over `memory` bytes.
    """
    return list(_within(memory, iterate_rows(path), path, "give fewer rows"))


def draw_rows(
    path: Path, pool: int, seed: int, *, columns: Columns | None = None, memory: int | None = None
) -> tuple[np.ndarray, list[Row]]:
    """At most `pool` rows drawn by `seed` without replacement, and their numbers, which ascend.

    No more than these are in memory, of Parquet only the `columns` asked for; but for that rows
    outside the draw are looked at too. Raises InputError as `read_rows`.
    """
    total = count_rows(path)
    chosen = draw(total, pool, seed) if total > pool else None
    rows = iterate_rows(path, columns=columns, chosen=chosen)
    kept = list(_within(memory, rows, path, "draw fewer rows with samples.pool"))
    indices = np.arange(len(kept)) if chosen is None else chosen
    if len(kept) != min(total, pool):
        raise InputError(f"{path} was changed while it was read: start again")
    return indices, kept


def draw(total: int, most: int, seed: int) -> np.ndarray:
    """At most so many of `total` numbers from 0, drawn by `seed` without replacement, ascending."""
    if total <= most:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, most, replace=False))


def rows_at(path: Path, indices: np.ndarray) -> list[Row]:
    """The rows with these numbers, which ascend, whole."""
    return list(iterate_rows(path, chosen=indices))


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines; values that JSON lacks, such as dates of Parquet, as text."""
    # Half a surrogate pair, which UTF-8 lacks, becomes the escape that JSON has for it.
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
    """What a value takes in memory, with all that it holds."""
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        return size + sum(_bytes_of(each) for pair in value.items() for each in pair)
    return size + (sum(map(_bytes_of, value)) if isinstance(value, list) else 0)
