"""The journal of a merge: what is finished, so that an interrupted merge can go on.

Lines of JSON: first what is merged, then records of what was prepared, by the name of their kind,
then each finished unit with the writer's mark. Each line ends with its checksum: one that a kill
cut short, or that is damaged in any other way, is as if it and what follows were not there.
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
    """A journal on disk. `identity` and `prepared` are JSON values; `units` are in order.

    Without a path it is kept in memory: of processes that work together one writes it.
    """

    path: Path | None
    identity: Mapping[str, Any]
    prepared: dict[str, Any] = field(default_factory=dict)
    units: dict[str, Mark] = field(default_factory=dict)

    def record_prepared(self, record: "DataclassInstance") -> None:
        """Note a record of what the walk over the units starts from, in place of one of its kind.

        Its fields hold what JSON holds, and dataclasses of the same.
        """
        kind = type(record).__name__
        self.prepared[kind] = asdict(record)
        self._append({"prepared": {kind: self.prepared[kind]}})

    def find_prepared(self, kind: type[Record]) -> Record | None:
        """Return the record of this kind, if there is one."""
        found = self.prepared.get(kind.__name__)
        return None if found is None else TypeAdapter(kind).validate_python(found)

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
    """The journal of an interrupted merge of these units, empty if there is none to be read.

    Raises UnfinishedError where it is of another merge, or an input has changed since.
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
        else:  # damaged: what follows it is not to be believed
            break
    return journal


def read_identity(path: Path) -> Mapping[str, Any]:
    """What the merge was that a journal is of; empty where there is none to be read."""
    records, _ = valid_records(path)
    found = records[0].get("identity") if records else None
    return found if isinstance(found, dict) else {}


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
