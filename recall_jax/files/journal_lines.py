"""Read and write the lines of a journal: JSON records, each with a checksum.

A line that a kill left incomplete, or that is otherwise damaged, is ignored with all lines after
it.
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
    """Return the line of a journal for a record, which may not be empty, with its checksum."""
    text = json.dumps(record)
    return text[:-1] + _ending(text.encode())


def _ending(text: bytes) -> str:
    return f', "checksum": "{zlib.crc32(text):08x}"}}\n'


def _record_in(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line, or None if the line is incomplete or damaged."""
    text = line[: -len(_ending(b""))] + b"}"
    if not line.endswith(_ending(text).encode()):
        return None
    record: dict[str, Any] = json.loads(text)
    return record


def append_record(
    path: Path, record: Mapping[str, Any], header: Mapping[str, Any] | None = None
) -> None:
    """Append a record to a journal, after `header` if the journal is still empty.

    Raises StorageError, with the journal unchanged, if the disk is full or fails.
    """
    size = path.stat().st_size if path.exists() else 0
    text = journal_line(record)
    if header is not None and not size:
        text = journal_line(header) + text
    try:
        with storage_faults(f"write {path}"), path.open("a", encoding="utf-8") as file:
            file.write(text)
    except StorageError:  # half a line would make the journal look resumable
        with suppress(OSError):
            os.truncate(path, size)
        raise


def repair_journal(path: Path) -> list[dict[str, Any]]:
    """Return the records before the first damaged line, and truncate the journal there."""
    records, size = valid_records(path)
    if path.exists():
        with storage_faults(f"write {path}"):
            os.truncate(path, size)
    return records


def valid_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records before the first damaged line, and the number of bytes they take."""
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
    """Return the first path whose entry differs between two records of input files, or None."""
    return next((path for path in {**then, **now} if then.get(path) != now.get(path)), None)


def differences(then: Any, now: Any, name: str = "") -> Sequence[str]:
    """Return the dotted names of the entries in which two JSON values differ."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        return [
            found
            for key in dict.fromkeys([*then, *now])
            for found in differences(
                then.get(key), now.get(key), f"{name}.{key}" if name else str(key)
            )
        ]
    return [] if then == now else [name]
