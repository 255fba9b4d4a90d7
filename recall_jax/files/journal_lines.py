"""The lines of journals: records of JSON, whole or as if they were not there.

Each line ends with its checksum: one that a kill cut short, or that is damaged in any other way,
is as if it and what follows were not there.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from recall_jax.errors import StorageError, storage_faults


def journal_line(record: Mapping[str, Any]) -> str:
    """A line of a journal: the record, which is not empty, and its checksum."""
    text = json.dumps(record)
    return text[:-1] + _ending(text.encode())


def _ending(text: bytes) -> str:
    return f', "checksum": "{zlib.crc32(text):08x}"}}\n'


def _record_in(line: bytes) -> dict[str, Any] | None:
    """The record of a whole line, None of any other."""
    text = line[: -len(_ending(b""))] + b"}"
    if not line.endswith(_ending(text).encode()):
        return None
    record: dict[str, Any] = json.loads(text)
    return record


def append_record(
    path: Path, record: Mapping[str, Any], header: Mapping[str, Any] | None = None
) -> None:
    """Add a line to a journal; the `header`, if it has one, is the first of all.

    StorageError, which leaves the journal as it was, where the disk does not take it.
    """
    size = path.stat().st_size if path.exists() else 0
    text = journal_line(record)
    if header is not None and not size:
        text = journal_line(header) + text
    try:
        with storage_faults(f"write {path}"), path.open("a", encoding="utf-8") as file:
            file.write(text)
    except StorageError:  # of a journal that ends in half a line, something would seem to be kept
        with suppress(OSError):
            os.truncate(path, size)
        raise


def mended_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal up to the first that cannot be read; from there on it is cut off."""
    records, size = whole_records(path)
    if path.exists():
        with storage_faults(f"write {path}"):
            os.truncate(path, size)
    return records


def whole_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a journal up to the first that cannot be read, and their bytes."""
    records: list[dict[str, Any]] = []
    size = 0
    if not path.exists():
        return [], 0
    with storage_faults(f"read {path}"):
        lines = path.read_bytes().splitlines(keepends=True)
    for line in lines:
        if (record := _record_in(line)) is None:
            break
        records.append(record)
        size += len(line)
    return records, size


def changed_input(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first path at which two records of input files differ, or only one has a file."""
    return next((path for path in {**then, **now} if then.get(path) != now.get(path)), None)


def differences(then: Any, now: Any, name: str = "") -> Sequence[str]:
    """Names of the entries in which two JSON values differ, those within others dotted."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        return [
            found
            for key in dict.fromkeys([*then, *now])
            for found in differences(
                then.get(key), now.get(key), f"{name}.{key}" if name else str(key)
            )
        ]
    return [] if then == now else [name]
