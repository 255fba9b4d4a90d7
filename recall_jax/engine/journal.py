"""Record what is finished of a merge, so that an interrupted merge can be resumed.

A journal holds lines of JSON: first the identity of the merge, then records of what was prepared,
by the name of their class, then each finished unit with the writer's mark. Each line ends with its
checksum: a line that was truncated or damaged is ignored, together with all lines after it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from recall_jax.checkpoint.companions import companions
from recall_jax.checkpoint.folder import Checkpoint, older_folders
from recall_jax.checkpoint.writer import Mark
from recall_jax.errors import UnfinishedError, storage_faults
from recall_jax.files.checksums import file_checksum
from recall_jax.files.journal_lines import (
    append_record,
    changed_input,
    differences,
    journal_line,
    valid_records,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record")

FORMAT = 3
_ADVICE = "or run without --resume to start afresh"


@dataclass
class MergeJournal:
    """Hold the journal of one merge.

    `identity` and `prepared` are JSON values; `units` are in the order of the forward pass. Without
    a path the journal is only in memory: of several processes, only one writes it.
    """

    path: Path | None
    identity: Mapping[str, Any]
    prepared: dict[str, Any] = field(default_factory=dict)
    units: dict[str, Mark] = field(default_factory=dict)

    def record_prepared(self, record: "DataclassInstance") -> None:
        """Append a record of what the walk starts from, replacing one of the same class.

        Its fields hold JSON values, or dataclasses of those.
        """
        kind = type(record).__name__
        self.prepared[kind] = asdict(record)
        self._append({"prepared": {kind: self.prepared[kind]}})

    def find_prepared(self, kind: type[Record]) -> Record | None:
        """Return the record of this class, if there is one."""
        found = self.prepared.get(kind.__name__)
        return None if found is None else TypeAdapter(kind).validate_python(found)

    def record_unit(self, unit: str, mark: Mark) -> None:
        """Record that a unit is completely written."""
        self.units[unit] = mark
        self._append({"unit": unit, **mark._asdict()})

    def keep(self, count: int) -> None:
        """Discard all but the first `count` units, in memory and on disk."""
        self.units = dict(list(self.units.items())[:count])
        if self.path is None:
            return
        records: list[Mapping[str, Any]] = []
        if self.prepared:
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


def resume_merge_journal(
    path: Path, identity: Mapping[str, Any], units: Sequence[str]
) -> MergeJournal:
    """Return the journal of an interrupted merge of these units, empty if there is no readable one.

    Raises UnfinishedError if the journal is that of another merge, or an input has changed since.
    """
    journal = MergeJournal(path, identity)
    records, _ = valid_records(path)
    if not records or records[0].get("format") != FORMAT or "identity" not in records[0]:
        return journal
    _check_same(records[0]["identity"], json.loads(json.dumps(identity)))
    due = iter(units)
    for record in records[1:]:
        if "prepared" in record:
            journal.prepared |= record["prepared"]
        elif record.keys() == {"unit", *Mark._fields} and record["unit"] == next(due, None):
            journal.units[record["unit"]] = Mark(*(record[key] for key in Mark._fields))
        else:  # damaged: ignore it and all records after it
            break
    return journal


def read_identity(path: Path) -> Mapping[str, Any]:
    """Return the identity in the journal at `path`, empty if there is no readable journal."""
    records, _ = valid_records(path)
    found = records[0].get("identity") if records else None
    return found if isinstance(found, dict) else {}


def input_files(
    models: Sequence[Checkpoint], files: Iterable[Path], *, content: bool = True
) -> dict[str, Any]:
    """Return the identity of every file that a run reads, by path: its size and checksum.

    These are the files of the models, those copied from the last model, and the `files` that exist.
    Weights are identified by `content` or by their times, as in `Checkpoint.fingerprint`.
    """
    inputs: dict[str, Any] = {}
    with ThreadPoolExecutor(2) as pool:  # computing a checksum releases the GIL
        for found in pool.map(lambda model: model.fingerprint(content=content), models):
            inputs |= found
    newest, older = models[-1], older_folders(models)
    copied = companions(newest.folder, newest.tokenizer_folders, older).files.values()
    for path in (*copied, *filter(Path.is_file, files)):
        inputs[str(path.resolve())] = list(file_checksum(path).values())
    return inputs


def _check_same(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UnfinishedError for the first difference between two identities."""
    if then.keys() != now.keys():
        raise UnfinishedError(
            f"what was interrupted here is another command: resume it with that, {_ADVICE}"
        )
    for part in ("recipe", "program"):  # first, since another recipe may have other inputs
        if keys := differences(then[part], now[part]):
            was = f" ({then[part].get(keys[0])})" if part == "program" else ""
            raise UnfinishedError(
                f"the interrupted merge had another {keys[0]}{was}: go back to it, {_ADVICE}"
            )
    if path := changed_input(then["inputs"], now["inputs"]):
        raise UnfinishedError(
            f"{path} is not what it was when the merge was interrupted: restore it, {_ADVICE}"
        )
