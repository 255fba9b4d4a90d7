"""The journal of a merge: what is finished, so that an interrupted merge can go on.

Lines of JSON: first what is merged, then what the forward pass was prepared with, then each
finished unit with the writer's mark. A line that a kill cut short is as if it were not there.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recall_jax.checkpoint.writer import Mark
from recall_jax.errors import InputError, storage_faults

FORMAT = 1
_ADVICE = "run without --resume to start afresh"


@dataclass
class Journal:
    """A journal on disk. `identity` and `prepared` are JSON values; `units` are in order."""

    path: Path
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
        fresh = self.path.with_suffix(".new")
        whole = Journal(fresh, self.identity)
        with suppress(FileNotFoundError):
            fresh.unlink()
        if self.prepared is not None:
            whole.record_prepared(self.prepared)
        for unit, mark in self.units.items():
            whole.record_unit(unit, mark)
        if fresh.exists():
            fresh.replace(self.path)
        else:  # of no use: what came after a first line that was cut short could not be read
            self.path.unlink(missing_ok=True)

    def _append(self, record: Mapping[str, Any]) -> None:
        with (
            storage_faults(f"write {self.path}"),
            self.path.open("a", encoding="utf-8") as file,
        ):
            if file.tell() == 0:
                file.write(_line({"format": FORMAT, "identity": self.identity}))
            file.write(_line(record))


def resume_journal(path: Path, identity: Mapping[str, Any]) -> Journal:
    """The journal of an interrupted merge, empty if there is none that can be read.

    Raises InputError where it is of another merge, or an input has changed since.
    """
    records = _records(path)
    journal = Journal(path, identity)
    if not records or records[0].get("format") != FORMAT:
        return journal
    _check_same(records[0]["identity"], json.loads(json.dumps(identity)))
    for record in records[1:]:
        if "prepared" in record:
            journal.prepared = record["prepared"]
        else:
            unit = record.pop("unit")
            journal.units[unit] = Mark(**record)
    return journal


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal, up to the first that cannot be read."""
    records = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            record = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            record = None
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def _check_same(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InputError for the first difference between two identities."""
    for part in ("recipe", "program"):  # another recipe may well have other inputs
        if keys := _differences(then[part], now[part]):
            raise InputError(f"the interrupted merge had another {keys[0]}: {_ADVICE}")
    for path in {**then["inputs"], **now["inputs"]}:
        if then["inputs"].get(path) != now["inputs"].get(path):
            raise InputError(f"{path} is not what it was when the merge was interrupted: {_ADVICE}")


def _differences(then: Any, now: Any, name: str = "") -> Sequence[str]:
    """Names of the entries in which two JSON values differ."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        return [
            found
            for key in dict.fromkeys([*then, *now])
            for found in _differences(
                then.get(key), now.get(key), f"{name}.{key}" if name else str(key)
            )
        ]
    return [] if then == now else [name]
