"""The journal of an evaluation: which tasks of which models are finished, with their metrics.

Lines of JSON: first what is evaluated, then each finished (model, task). A line that a kill cut
short, or that is damaged, is as if it and what follows were not there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recall_jax.evaluation.metrics import Estimate
from recall_jax.files.checksums import FileChecksum, file_checksum
from recall_jax.files.results import Records, same_identity

TaskMetrics = dict[tuple[int, str], dict[str, Estimate]]
"""The metrics by name, of each pair of a model's index and a task's name."""


@dataclass
class EvaluationJournal(Records):
    """What is finished, here and, where there is a path, on disk."""

    results: TaskMetrics = field(default_factory=dict)
    answers: dict[tuple[int, str], FileChecksum] = field(default_factory=dict)

    def record(
        self, model: int, task: str, metrics: dict[str, Estimate], answers: Path | None = None
    ) -> None:
        """Note the metrics of one task of one model, and the file of what it answered."""
        self.results[model, task] = metrics
        known = None if answers is None else file_checksum(answers)
        self.append({"model": model, "task": task, "metrics": metrics, "answers": known})

    def forget_lost(self, answers: Callable[[int, str], Path]) -> None:
        """Forget what is finished whose file of answers is gone, or not as it was written."""
        for pair, known in self.answers.items():
            path = answers(*pair)
            if not path.is_file() or file_checksum(path) != known:
                del self.results[pair]


def resume_evaluation_journal(path: Path, identity: Mapping[str, Any]) -> EvaluationJournal:
    """The journal of an interrupted evaluation, empty if there is none to be read.

    Raises UnfinishedError where it is of another evaluation. A line cut short is removed.
    """
    journal = EvaluationJournal(path, identity)
    for record in journal.resume(same_identity("evaluation")):
        if record.keys() != {"model", "task", "metrics", "answers"}:  # a whole line, but not ours
            break
        metrics = {name: Estimate(*values) for name, values in record["metrics"].items()}
        pair = record["model"], record["task"]
        journal.results[pair] = metrics
        if record["answers"] is not None:
            journal.answers[pair] = record["answers"]
    return journal
