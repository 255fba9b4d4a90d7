"""Record in a journal which models of a continual-learning run were made and measured.

The journal consists of lines of JSON: first the identity of the run, without its strategies, then
the scores of each model and the time it took to make. A damaged line, such as one truncated by a
kill, is ignored with all that follow it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recall_jax.errors import UnfinishedError
from recall_jax.files.journal_lines import changed_input, valid_records
from recall_jax.files.results import Records

ModelResults = dict[str, dict[str, Any]]
"""Metrics by name for each evaluation task, each in the form of `evaluation.json`."""

_ADVICE = "or run without --resume to start afresh"


@dataclass
class ContinualJournal(Records):
    """Hold the results of each model by name, in memory and on disk."""

    results: dict[str, ModelResults] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)

    def record_made(self, model: str, seconds: float, warnings: Sequence[str]) -> None:
        """Record that a model was made; the seconds of repeated runs add up."""
        record = {"made": model, "seconds": seconds, "warnings": list(warnings)}
        self._record(record)

    def record_results(self, model: str, results: ModelResults) -> None:
        """Record the scores of a model."""
        record = {"evaluated": model, "results": results}
        self._record(record)

    def warning_lines(self) -> list[str]:
        """Return each warning once, with the models that it is about."""
        lines: dict[str, list[str]] = {}
        for model, warnings in self.warnings.items():
            for line in warnings:
                lines.setdefault(line, []).append(model)
        return [
            f"{models[0]}{f' and {len(models) - 1} more' if len(models) > 1 else ''}: {line}"
            for line, models in lines.items()
        ]

    def _record(self, record: Mapping[str, Any]) -> None:
        self._apply(record)
        self.append(record)

    def _apply(self, record: Mapping[str, Any]) -> None:
        if "made" in record:
            model = record["made"]
            self.seconds[model] = self.seconds.get(model, 0.0) + record["seconds"]
            self.warnings[model] = record["warnings"]
        elif "evaluated" in record:
            self.results[record["evaluated"]] = record["results"]


def open_journal(path: Path, identity: Mapping[str, Any]) -> ContinualJournal:
    """Open the journal of an interrupted run, or a new one.

    Raises UnfinishedError, which keeps the models made so far, if the journal is damaged or the
    run's identity has changed; strategies, orders and seeds may change.
    """
    journal = ContinualJournal(path, identity)
    if path.exists() and path.stat().st_size and not valid_records(path)[0]:
        raise UnfinishedError(f"{path}, of the interrupted run, is damaged: {_ADVICE[3:]}")
    for record in journal.resume(_check_same):
        journal._apply(record)
    return journal


def _check_same(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UnfinishedError for the first difference that would affect models made so far."""
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
