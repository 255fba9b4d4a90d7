"""What a long work has finished, kept as it comes, so that it can be resumed.

A journal whose first line is what the work depends on, its identity; each line after it is a record
of JSON values. A line that a kill cut short, or that is damaged, is as if it and what follows were
not there.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recall_jax.errors import UnfinishedError
from recall_jax.files.journal_lines import append_record, mended_records

Check = Callable[[Mapping[str, Any], Mapping[str, Any]], None]
"""Gets two identities, that of the interrupted work and of this one; raises UnfinishedError."""


@dataclass
class Records:
    """The records of a work, of JSON values; without a path they are not kept on disk."""

    path: Path | None
    identity: Mapping[str, Any]

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record, after the identity if it is the first; StorageError if the disk fails."""
        if self.path is not None:
            append_record(self.path, record, {"identity": self.identity})

    def resume(self, check: Check) -> list[dict[str, Any]]:
        """The records of the interrupted work, none if there are none to be read.

        A line cut short is removed. Raises what `check` raises, which compares the identities.
        """
        records = [] if self.path is None else mended_records(self.path)
        if records:
            check(records[0].get("identity", {}), json.loads(json.dumps(self.identity)))
        return records[1:]


@dataclass
class Results(Records):
    """What is finished, each result under a name, whether kept now or in an earlier run."""

    values: dict[str, Any] = field(default_factory=dict)

    def keep(self, name: str, value: Any) -> None:
        """Note a result, of JSON values without NaN."""
        plain = json.loads(json.dumps(value, allow_nan=False))
        self.append({"name": name, "value": plain})
        self.values[name] = plain


def resume_results(path: Path, identity: Mapping[str, Any], work: str) -> Results:
    """The results of an interrupted `work`, none if there are none to be read.

    Raises UnfinishedError where they are of another one. A line cut short is removed.
    """
    results = Results(path, identity)
    for record in results.resume(same_identity(work)):
        if record.keys() == {"name", "value"}:
            results.values[record["name"]] = record["value"]
    return results


def same_identity(work: str) -> Check:
    """A check that refuses every other identity; `work` is a word for what was interrupted."""

    def check(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key in {**now, **then}:
            if then.get(key) != now.get(key):
                raise UnfinishedError(
                    f"the interrupted {work} had other {key}: go back to them, or run without "
                    "--resume to start afresh"
                )

    return check
