"""Results that a long work keeps as they come, each under a name: lines of JSON.

The first line is what the work is of. A line that a kill cut short is as if it were not there.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recall_jax.engine.journal import whole_records
from recall_jax.errors import UnfinishedError, storage_faults


@dataclass
class Results:
    """What is finished, here and on disk; JSON values, whether kept now or in an earlier run."""

    path: Path
    identity: Mapping[str, Any]
    values: dict[str, Any] = field(default_factory=dict)

    def keep(self, name: str, value: Any) -> None:
        """Note a result, of JSON values without NaN."""
        line = json.dumps({"name": name, "value": value}, allow_nan=False)
        with storage_faults(f"write {self.path}"), self.path.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(json.dumps({"identity": self.identity}) + "\n")
            file.write(line + "\n")
        self.values[name] = json.loads(line)["value"]


def resume_results(path: Path, identity: Mapping[str, Any], work: str) -> Results:
    """The results of an interrupted `work`, none if there are none to be read.

    Raises UnfinishedError where they are of another one. A line cut short is removed.
    """
    records, size = whole_records(path)
    if path.exists():
        with storage_faults(f"write {path}"):
            os.truncate(path, size)
    if not records:
        return Results(path, identity)
    then, now = records[0].get("identity", {}), json.loads(json.dumps(identity))
    for key in {**now, **then}:
        if then.get(key) != now.get(key):
            raise UnfinishedError(
                f"the interrupted {work} had other {key}: go back to them, or run without "
                "--resume to start afresh"
            )
    return Results(path, identity, {each["name"]: each["value"] for each in records[1:]})
