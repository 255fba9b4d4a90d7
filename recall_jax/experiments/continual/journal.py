"""The journal of a continual-learning run: what was made and what was measured.

Lines of JSON: first what the run depends on beside its recipe's strategies, then what each model
scored and how long its making took. A line that a kill cut short, or that is damaged, is as if it
and what follows were not there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recall_jax.errors import UnfinishedError
from recall_jax.files.journal_lines import changed_input, valid_records
from recall_jax.files.results import Records

ModelResults = dict[str, dict[str, Any]]
"""An evaluation task's metrics by name, each as `evaluation.json` holds it."""

_ADVICE = "or run without --resume to start afresh"


@dataclass
class ContinualJournal(Records):
    """What is known of each model by its name, here and on disk."""

    results: dict[str, ModelResults] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)

    def record_made(self, model: str, seconds: float, warnings: Sequence[str]) -> None:
        """Note that a model was made; a second time counts as well."""
        record = {"made": model, "seconds": seconds, "warnings": list(warnings)}
        self._keep(record)

    def record_results(self, model: str, results: ModelResults) -> None:
        """Note what a model scored."""
        record = {"evaluated": model, "results": results}
        self._keep(record)

    def told(self) -> list[str]:
        """Each warning once, with the number of models that it is of."""
        lines: dict[str, list[str]] = {}
        for model, warnings in self.warnings.items():
            for line in warnings:
                lines.setdefault(line, []).append(model)
        return [
            f"{models[0]}{f' and {len(models) - 1} more' if len(models) > 1 else ''}: {line}"
            for line, models in lines.items()
        ]

    def _keep(self, record: Mapping[str, Any]) -> None:
        self._take(record)
        self.append(record)

    def _take(self, record: Mapping[str, Any]) -> None:
        if "made" in record:
            model = record["made"]
            self.seconds[model] = self.seconds.get(model, 0.0) + record["seconds"]
            self.warnings[model] = record["warnings"]
        elif "evaluated" in record:
            self.results[record["evaluated"]] = record["results"]


def open_journal(path: Path, identity: Mapping[str, Any]) -> ContinualJournal:
    """The journal of the run that was interrupted, or a new one.

    Raises UnfinishedError where what it depends on has changed, or can no longer be read, as the
    models that were made are kept; strategies, orders and seeds may.
    """
    journal = ContinualJournal(path, identity)
    if path.exists() and path.stat().st_size and not valid_records(path)[0]:
        raise UnfinishedError(f"{path}, of the interrupted run, is damaged: {_ADVICE[3:]}")
    for record in journal.resume(_check_same):
        journal._take(record)
    return journal


def _check_same(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UnfinishedError for the first difference that no model made so far may have."""
    if then.keys() != now.keys():
        raise UnfinishedError(
            f"what was interrupted here is another command: resume it with that, {_ADVICE}"
        )
    for key in ("program", "evaluated"):
        if then[key] != now[key]:
            raise UnfinishedError(
                f"the interrupted run had another {key}: go back to it, {_ADVICE}"
            )
    both = then["inputs"].keys() & now["inputs"].keys()
    if changed := changed_input(*({k: part["inputs"][k] for k in both} for part in (then, now))):
        raise UnfinishedError(
            f"{changed} is not what it was when the run was interrupted: restore it, {_ADVICE}"
        )
