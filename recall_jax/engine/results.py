"""Results that a long work keeps as they come, each under a name: lines of JSON.

The first line is what the work is of. A line that a kill cut short, or that is damaged, is as if it
and what follows were not there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recall_jax.engine.journal import append_record, mended_records
from recall_jax.errors import UnfinishedError


@dataclass
class Results:
    """What is finished, here and on disk; JSON values, whether kept now or in an earlier run."""

    path: Path
    identity: Mapping[str, Any]
    values: dict[str, Any] = field(default_factory=dict)

    def keep(self, name: str, value: Any) -> None:
        """Note a result, of JSON values without NaN."""
        plain = json.loads(json.dumps(value, allow_nan=False))
        append_record(self.path, {"name": name, "value": plain}, {"identity": self.identity})
        self.values[name] = plain


def resume_results(path: Path, identity: Mapping[str, Any], work: str) -> Results:
    """The results of an interrupted `work`, none if there are none to be read.

    Raises UnfinishedError where they are of another one. A line cut short is removed.
    """
    records = mended_records(path)
    if not records:
        return Results(path, identity)
    then, now = records[0].get("identity", {}), json.loads(json.dumps(identity))
    for key in {**now, **then}:
        if then.get(key) != now.get(key):
            raise UnfinishedError(
                f"the interrupted {work} had other {key}: go back to them, or run without "
                "--resume to start afresh"
            )
    kept = [each for each in records[1:] if each.keys() == {"name", "value"}]
    return Results(path, identity, {each["name"]: each["value"] for each in kept})
