"""Record which tasks of which models are finished, with their metrics, in a journal.

The journal consists of lines of JSON: first the identity of the evaluation, then each finished
(model, task). A damaged line, such as one truncated by a kill, is ignored with all that follow it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recall_jax.evaluation.metrics import Estimate
from recall_jax.files.checksums import FileChecksum, file_checksum
from recall_jax.files.results import Records, same_identity

TaskMetrics = dict[tuple[int, str], dict[str, Estimate]]
"""Metrics by name for each (model index, task name)."""


@dataclass
class EvaluationJournal(Records):
    """Hold the finished results in memory and, if there is a path, on disk."""

    results: TaskMetrics = field(default_factory=dict)
    answers: dict[tuple[int, str], FileChecksum] = field(default_factory=dict)

    def record(
        self, model: int, task: str, metrics: dict[str, Estimate], answers: Path | None = None
    ) -> None:
        """Record the metrics of one model on one task, and the file of its answers."""
        self.results[model, task] = metrics
        checksum = None if answers is None else file_checksum(answers)
        self.append({"model": model, "task": task, "metrics": metrics, "answers": checksum})

    def forget_lost(self, answers: Callable[[int, str], Path]) -> None:
        """Forget the results whose file of answers is missing or changed.

        `answers(model, task)` returns the path of the file.
        """
        for pair, checksum in self.answers.items():
            path = answers(*pair)
            if not path.is_file() or file_checksum(path) != checksum:
                del self.results[pair]


def resume_evaluation_journal(path: Path, identity: Mapping[str, Any]) -> EvaluationJournal:
    """Return the journal of an interrupted evaluation, empty if there is none.

    Raises UnfinishedError if it belongs to another evaluation. A truncated line is removed.
    """
    journal = EvaluationJournal(path, identity)
    for record in journal.resume(same_identity("evaluation")):
        if record.keys() != {"model", "task", "metrics", "answers"}:  # of another version
            break
        metrics = {name: Estimate(*values) for name, values in record["metrics"].items()}
        pair = record["model"], record["task"]
        journal.results[pair] = metrics
        if record["answers"] is not None:
            journal.answers[pair] = record["answers"]
    return journal
