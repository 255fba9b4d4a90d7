"""Where models are made when they are needed, measured, and cleared away."""

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
    makers,
    needed,
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
    """A folder of models that are made once, each absent or complete, and the journal of it.

    `asked` are the tasks that every model is asked, with `options`.
    """

    folder: Path
    journal: ContinualJournal
    asked: Sequence[TaskExamples]
    options: EvaluateOptions
    progress: Progress

    def spec(self, model: Model) -> str:
        """Where a model is or will be, as recipes name it."""
        places = [self._place(part) for part in parts(model)]
        return "+".join(places)

    def exists(self, model: Model) -> bool:
        """Whether a model's own folder is there."""
        return isinstance(model, Given) or (self.folder / model.name).is_dir()

    def results(self, model: Model) -> ModelResults:
        """What a model answers to all tasks; it is made and asked once."""
        if model.name not in self.journal.results:
            self.make(model)
            self.journal.record_results(model.name, self._ask(model))
        return self.journal.results[model.name]

    def make(self, model: Model) -> None:
        """Make a model that is not there, and before it those that it is made from."""
        if isinstance(model, Given):
            return
        if self.exists(model):
            for part in parts(model)[:-1]:
                self.make(part)
            return
        for maker in makers(model):
            self.make(maker)
        clock = Clock()
        with clock.stage("made"):
            warnings = self._fine_tune(model) if isinstance(model, Tuned) else self._merge(model)
        self.journal.record_made(model.name, clock.seconds["made"], warnings)

    def clear(self, wanted: Sequence[Model]) -> None:
        """Remove all models but those that are wanted, and that are needed to make them."""
        names = needed(wanted, self.exists)
        with storage_faults(f"clear {self.folder}"):
            for path in self.folder.iterdir():
                if path.name not in names:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _place(self, model: Model) -> str:
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

    def _ask(self, model: Model) -> ModelResults:
        checkpoint = open_checkpoint(self.spec(model))
        resident = with_weights(without_weights(checkpoint, self.options.ignore_config), checkpoint)
        resident = replace(resident, params=jax.device_put(resident.params))  # once for all tasks
        dtype = compute_dtype(self.options.compute_dtype, checkpoint)
        results: ModelResults = {}
        for done, each in enumerate(self.asked):
            self.progress(each.task.task, done, len(self.asked))
            scored = score(
                each.task, each.examples, resident, batch_size=self.options.batch_size, dtype=dtype
            )
            results[each.task.task] = {
                name: estimate._asdict() for name, estimate in scored.metrics.items()
            }
        return results

    def _named(self, label: str) -> Progress:
        """Progress that says first whose it is."""

        def tell(doing: str, done: int, total: int, **told: Any) -> None:
            self.progress(f"{label}: {doing}", done, total, **told)

        return tell


def _join(files: Sequence[str], path: Path) -> None:
    """The rows of several files in one of JSON lines."""
    with output_file(path, force=True) as out, storage_faults(f"write {path}"):
        write_jsonl(out, (row for file in files for row in iterate_rows(Path(file))))
