"""The journal of a merge: what is finished, so that an interrupted merge can go on.

Lines of JSON: first what is merged, then what the forward pass was prepared with, then each
finished unit with the writer's mark. Each line ends with its checksum: one that a kill cut short,
or that is damaged in any other way, is as if it and what follows were not there.
"""

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recall_jax.checkpoint.companions import companions
from recall_jax.checkpoint.folder import Checkpoint, older_folders
from recall_jax.checkpoint.writer import Mark
from recall_jax.errors import StorageError, UnfinishedError, storage_faults
from recall_jax.files.checksums import file_checksum

FORMAT = 2
_ADVICE = "or run without --resume to start afresh"


@dataclass
class Journal:
    """A journal on disk. `identity` and `prepared` are JSON values; `units` are in order.

    Without a path it is kept in memory: of processes that work together one writes it.
    """

    path: Path | None
    identity: Mapping[str, Any]
    prepared: Mapping[str, Any] | None = None
    units: dict[str, Mark] = field(default_factory=dict)

    def record_prepared(self, prepared: Mapping[str, Any]) -> None:
        """Note what the walk over the units starts from."""
        self.prepared = prepared
        self._append({"prepared": prepared})

    def record_unit(self, unit: str, mark: Mark) -> None:
        """Note that a unit is written whole."""
        self.units[unit] = mark
        self._append({"unit": unit, **mark._asdict()})

    def keep(self, count: int) -> None:
        """Forget all but the first `count` units, here and on disk."""
        self.units = dict(list(self.units.items())[:count])
        if self.path is None:
            return
        records: list[Mapping[str, Any]] = []
        if self.prepared is not None:
            records.append({"prepared": self.prepared})
        records += [{"unit": unit, **mark._asdict()} for unit, mark in self.units.items()]
        fresh = self.path.with_suffix(".new")
        with storage_faults(f"write {self.path}"):
            if records:
                lines = map(journal_line, [self._header(), *records])
                fresh.write_text("".join(lines), encoding="utf-8")
                fresh.replace(self.path)
            else:
                self.path.unlink(missing_ok=True)

    def _header(self) -> dict[str, Any]:
        return {"format": FORMAT, "identity": self.identity}

    def _append(self, record: Mapping[str, Any]) -> None:
        if self.path is not None:
            append_record(self.path, record, self._header())


def resume_journal(path: Path, identity: Mapping[str, Any], units: Sequence[str]) -> Journal:
    """The journal of an interrupted merge of these units, empty if there is none to be read.

    Raises UnfinishedError where it is of another merge, or an input has changed since.
    """
    journal = Journal(path, identity)
    records, _ = whole_records(path)
    if not records or records[0].get("format") != FORMAT or "identity" not in records[0]:
        return journal
    _check_same(records[0]["identity"], json.loads(json.dumps(identity)))
    due = iter(units)
    for record in records[1:]:
        if "prepared" in record:
            journal.prepared = record["prepared"]
        elif record.keys() == {"unit", *Mark._fields} and record["unit"] == next(due, None):
            journal.units[record["unit"]] = Mark(*(record[key] for key in Mark._fields))
        else:  # damaged: what follows it is not to be believed
            break
    return journal


def identity_in(path: Path) -> Mapping[str, Any]:
    """What the merge was that a journal is of; empty where there is none to be read."""
    records, _ = whole_records(path)
    found = records[0].get("identity") if records else None
    return found if isinstance(found, dict) else {}


def journal_line(record: Mapping[str, Any]) -> str:
    """A line of a journal of any kind: the record, which is not empty, and its checksum."""
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
    """Add a line to a journal of any kind; the `header`, if it has one, is the first of all.

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


def input_files(
    models: Sequence[Checkpoint], files: Iterable[Path], *, content: bool = True
) -> dict[str, Any]:
    """What every file that a run reads is known by, by its path: size and checksum.

    Those of the models, those that are copied from the last one, and `files` where there are such.
    Weights are known by `content` or by their times, as for `Checkpoint.fingerprint`.
    """
    inputs: dict[str, Any] = {}
    with ThreadPoolExecutor(2) as pool:  # a checksum lets other threads run
        for found in pool.map(lambda model: model.fingerprint(content=content), models):
            inputs |= found
    newest, older = models[-1], older_folders(models)
    copied = companions(newest.folder, newest.tokenizer_folders, older).files.values()
    for path in (*copied, *filter(Path.is_file, files)):
        inputs[str(path.resolve())] = list(file_checksum(path).values())
    return inputs


def changed_input(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first path at which two records of input files differ, or only one has a file."""
    return next((path for path in {**then, **now} if then.get(path) != now.get(path)), None)


def _check_same(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UnfinishedError for the first difference between two identities."""
    if then.keys() != now.keys():
        raise UnfinishedError(
            f"what was interrupted here is another command: resume it with that, {_ADVICE}"
        )
    for part in ("recipe", "program"):  # another recipe may well have other inputs
        if keys := differences(then[part], now[part]):
            was = f" ({then[part].get(keys[0])})" if part == "program" else ""
            raise UnfinishedError(
                f"the interrupted merge had another {keys[0]}{was}: go back to it, {_ADVICE}"
            )
    if path := changed_input(then["inputs"], now["inputs"]):
        raise UnfinishedError(
            f"{path} is not what it was when the merge was interrupted: restore it, {_ADVICE}"
        )


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
