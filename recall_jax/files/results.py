"""Record the finished results of a long work, so that it can be resumed.

The first line of the journal is the work's identity: everything that its results depend on. Each
later line is a record of JSON values. An incomplete or damaged line is ignored with all lines after
it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recall_jax.errors import UnfinishedError
from recall_jax.files.journal_lines import append_record, repair_journal

IdentityCheck = Callable[[Mapping[str, Any], Mapping[str, Any]], None]
"""Compares the identities of the interrupted work and this one; raises UnfinishedError."""


@dataclass
class Records:
    """Keep the JSON records of a work; without a path they are not written to disk."""

    path: Path | None
    identity: Mapping[str, Any]

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a record, after the identity if it is the first; StorageError if writing fails."""
        if self.path is not None:
            append_record(self.path, record, {"identity": self.identity})

    def resume(self, check: IdentityCheck) -> list[dict[str, Any]]:
        """Return the records of the interrupted work, empty if none can be read.

        Removes an incomplete last line. Raises what `check`, which compares the identities, raises.
        """
        records = [] if self.path is None else repair_journal(self.path)
        if records:
            check(records[0].get("identity", {}), json.loads(json.dumps(self.identity)))
        return records[1:]


@dataclass
class Results(Records):
    """Keep finished results by name, from this run and from earlier ones."""

    values: dict[str, Any] = field(default_factory=dict)

    def keep(self, name: str, value: Any) -> None:
        """Record a result, a JSON value without NaN."""
        plain = json.loads(json.dumps(value, allow_nan=False))
        self.append({"name": name, "value": plain})
        self.values[name] = plain


def resume_results(path: Path, identity: Mapping[str, Any], work: str) -> Results:
    """Return the results of the interrupted `work`, empty if none can be read.

    Raises UnfinishedError if they belong to a work of another identity. Removes an incomplete line.
    """
    results = Results(path, identity)
    for record in results.resume(same_identity(work)):
        if record.keys() == {"name", "value"}:
            results.values[record["name"]] = record["value"]
    return results


def same_identity(work: str) -> IdentityCheck:
    """Return a check that raises UnfinishedError, which names `work`, for any other identity."""

    def check(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key in {**now, **then}:
            if then.get(key) != now.get(key):
                raise UnfinishedError(
                    f"the interrupted {work} had other {key}: go back to them, or run without "
                    "--resume to start afresh"
                )

    return check
