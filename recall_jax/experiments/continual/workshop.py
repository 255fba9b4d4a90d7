"""Make models when they are needed, measure them, and remove them afterwards."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.engine.inputs import compute_dtype
from recall_jax.errors import storage_faults
from recall_jax.evaluation.resident import with_weights, without_weights
from recall_jax.evaluation.scoring import score
from recall_jax.experiments.continual.journal import ContinualJournal, ModelResults
from recall_jax.experiments.continual.lineage import (
    Given,
    MergedModel,
    Model,
    Tuned,
    needed,
    parents,
    parts,
)
from recall_jax.files.output import output_file
from recall_jax.files.progress import Clock, Progress
from recall_jax.inputs.data import write_jsonl
from recall_jax.inputs.row_files import iterate_rows
from recall_jax.jobs import finetune as tuning
from recall_jax.jobs import merge as job
from recall_jax.jobs.evaluate import EvaluateOptions, TaskExamples
from recall_jax.recipes.recipe import make_recipe


@dataclass(frozen=True)
class Workshop:
    """Manage a folder of models, each absent or complete, and its journal.

    Every model is evaluated on `tasks` with `options`.
    """

    folder: Path
    journal: ContinualJournal
    tasks: Sequence[TaskExamples]
    options: EvaluateOptions
    progress: Progress

    def spec(self, model: Model) -> str:
        """Return the present or future location of a model, as recipes name it."""
        return "+".join(self._location(part) for part in parts(model))

    def exists(self, model: Model) -> bool:
        """Return whether a model's folder exists, without the folders of its parents."""
        return isinstance(model, Given) or (self.folder / model.name).is_dir()

    def results(self, model: Model) -> ModelResults:
        """Return a model's metrics on all tasks; it is made and evaluated at most once."""
        if model.name not in self.journal.results:
            self.make(model)
            self.journal.record_results(model.name, self._evaluate(model))
        return self.journal.results[model.name]

    def make(self, model: Model) -> None:
        """Make a model if it does not exist, and first those that it is made from."""
        if isinstance(model, Given):
            return
        if self.exists(model):
            for part in parts(model)[:-1]:
                self.make(part)
            return
        for parent in parents(model):
            self.make(parent)
        clock = Clock()
        with clock.stage("made"):
            warnings = self._fine_tune(model) if isinstance(model, Tuned) else self._merge(model)
        self.journal.record_made(model.name, clock.seconds["made"], warnings)

    def clear(self, wanted: Sequence[Model]) -> None:
        """Remove all models except the wanted ones, and those needed to make them."""
        names = needed(wanted, self.exists)
        with storage_faults(f"clear {self.folder}"):
            for path in self.folder.iterdir():
                if path.name not in names:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _location(self, model: Model) -> str:
        return model.name if isinstance(model, Given) else str(self.folder / model.name)

    def _fine_tune(self, model: Tuned) -> list[str]:
        anchors = tuple(str(self.folder / each.name / tuning.FISHER) for each in model.anchors)
        rows = self.folder / f"{model.name}.jsonl"
        if len(model.data) > 1 and not rows.exists():
            _join(model.data, rows)
        settings = replace(
            model.settings,
            data=str(rows) if len(model.data) > 1 else model.data[0],
            ewc_fisher=anchors,
        )
        record = tuning.finetune(
            self.spec(model.start),
            self.folder / model.name,
            settings,
            options=tuning.FinetuneOptions(resume=True),
            progress=self._named(model.label),
        )
        rows.unlink(missing_ok=True)
        return list(record["warnings"])

    def _merge(self, model: MergedModel) -> list[str]:
        report = job.merge(
            make_recipe(model.values(self.spec)),
            self.folder / model.name,
            options=job.MergeOptions(resume=True),
            progress=self._named(model.label),
        )
        return list(report["warnings"])

    def _evaluate(self, model: Model) -> ModelResults:
        checkpoint = open_checkpoint(self.spec(model))
        resident = with_weights(without_weights(checkpoint, self.options.ignore_config), checkpoint)
        resident = replace(resident, params=jax.device_put(resident.params))
        dtype = compute_dtype(self.options.compute_dtype, checkpoint)
        results: ModelResults = {}
        for done, each in enumerate(self.tasks):
            self.progress(each.task.task, done, len(self.tasks))
            scored = score(
                each.task, each.examples, resident, batch_size=self.options.batch_size, dtype=dtype
            )
            results[each.task.task] = {
                name: estimate._asdict() for name, estimate in scored.metrics.items()
            }
        return results

    def _named(self, label: str) -> Progress:
        """Return a progress callback that prefixes the label of a model."""

        def report(doing: str, done: int, total: int, **details: Any) -> None:
            self.progress(f"{label}: {doing}", done, total, **details)

        return report


def _join(files: Sequence[str], path: Path) -> None:
    """Write the rows of several files into one of JSON lines."""
    with output_file(path, force=True) as out, storage_faults(f"write {path}"):
        write_jsonl(out, (row for file in files for row in iterate_rows(Path(file))))
