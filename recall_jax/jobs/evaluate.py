"""Evaluate models on tasks, and write their metrics and answers to a folder.

Rows and prompts are made before any model is loaded, and models are in memory one at a time. An
interrupted evaluation can be resumed after the last finished task of a model.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from recall_jax.checkpoint.folder import Checkpoint, file_warnings, open_checkpoint
from recall_jax.engine.inputs import compute_dtype
from recall_jax.errors import InputError, shown, storage_faults
from recall_jax.evaluation.examples import Example, make_examples
from recall_jax.evaluation.journal import EvaluationJournal, TaskMetrics, resume_evaluation_journal
from recall_jax.evaluation.lengths import check_memory, count_too_long
from recall_jax.evaluation.metrics import BLEU, check_metrics
from recall_jax.evaluation.resident import ResidentModel, with_weights, without_weights
from recall_jax.evaluation.rows import load_rows
from recall_jax.evaluation.scoring import Scored, headline, score
from recall_jax.evaluation.task import Task
from recall_jax.files.json_objects import write_json_object
from recall_jax.files.output import work_folder
from recall_jax.files.progress import Clock, Progress, silent
from recall_jax.inputs.data import write_jsonl
from recall_jax.parallel.machine import device, versions
from recall_jax.report.evaluation_page import render_evaluation
from recall_jax.report.wording import short_name

RECORD, PAGE, PREDICTIONS = "evaluation.json", "index.html", "predictions"


@dataclass(frozen=True)
class EvaluateOptions:
    """Set how models are evaluated: on at most `limit` rows of each task, drawn by `seed`.

    Rows come from files below `data_root`, or else from the hub. `compute_dtype` is that of the
    forward, by default as in `engine.inputs.compute_dtype`. `force` replaces an output, `resume`
    continues an interrupted one. Raises InputError for numbers out of range.
    """

    data_root: Path | None = None
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    compute_dtype: str | None = None
    ignore_config: tuple[str, ...] = ()
    force: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        """Raise InputError for numbers out of range."""
        for name, value in (("limit", self.limit), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise InputError(f"evaluate.{name} must be at least 1, not {value}")
            if value is not None and value >= 2**31:
                raise InputError(f"evaluate.{name} must be below 2^31, not {shown(value)}")


DEFAULTS = EvaluateOptions()


@dataclass(frozen=True)
class TaskExamples:
    """Hold a task and the examples of the rows drawn from its `total` rows.

    `source` describes where the rows came from, and `files` are those that were read.
    """

    task: Task
    examples: list[Example]
    total: int
    source: str
    files: tuple[Path, ...]

    def digest(self) -> str:
        """Return a SHA-256 checksum of the examples."""
        content = json.dumps([asdict(example) for example in self.examples])
        return hashlib.sha256(content.encode()).hexdigest()


def load_task_examples(task: Task, options: EvaluateOptions = DEFAULTS) -> TaskExamples:
    """Load a task's rows, and make examples of those drawn.

    Raises InputError if there are no rows, or one does not fit the task.
    """
    check_metrics(headline(task))
    rows = load_rows(task, options.data_root)
    drawn = rows.draw(options.limit, options.seed)
    examples = make_examples(task, drawn)
    return TaskExamples(task, examples, len(rows.rows), rows.source, rows.files)


def evaluate(
    models: Sequence[str],
    tasks: Sequence[Task],
    out: Path | None = None,
    *,
    options: EvaluateOptions = DEFAULTS,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluate models on tasks, and write the record, a page and all answers to `out`, if given.

    Returns the record in `evaluation.json`, with timings. Raises InputError for faults of models,
    tasks, rows or `out`, and UnfinishedError, which keeps finished tasks for `resume`.
    """
    if not models or not tasks:
        raise InputError("name at least one model and one task")
    clock = Clock()
    with clock.stage("total"):
        loaded = [load_task_examples(task, options) for task in tasks]
        checkpoints = [open_checkpoint(model) for model in models]
        residents = [  # faults of every model are found before the first one runs
            without_weights(checkpoint, options.ignore_config) for checkpoint in checkpoints
        ]
        warnings = file_warnings(checkpoints)
        warnings += [
            line
            for model, checkpoint in zip(residents, checkpoints, strict=True)
            for line in _too_long(model, checkpoint.name, loaded, options.batch_size)
        ]
        names = [f"{k}-{_file_name(model)}" for k, model in enumerate(models)]
        with _open_output(out, checkpoints, loaded, options) as (folder, journal):

            def answers(k: int, task: str) -> Path:
                assert folder is not None
                return folder / PREDICTIONS / names[k] / f"{task}.jsonl"

            journal.forget_lost(answers)
            rows = {each.task.task: len(each.examples) for each in loaded}
            total = len(models) * sum(rows.values())

            def report_done(doing: str, answered: int) -> None:
                done = sum(rows[task] for _, task in journal.results)
                progress(doing, done + answered, total)

            for k, (model, checkpoint) in enumerate(zip(residents, checkpoints, strict=True)):
                missing = [each for each in loaded if (k, each.task.task) not in journal.results]
                for each, scored in _score_tasks(
                    model, checkpoint, missing, options, clock, report_done
                ):
                    task = each.task.task
                    path = None if folder is None else answers(k, task)
                    if path is not None:
                        _write_predictions(path, scored)
                    journal.record(k, task, scored.metrics, path)
            record = _record(models, names, loaded, journal.results, options)
            record["warnings"] = warnings
            if folder is not None:
                _write(folder, record)
    return record | {"timing_s": clock.seconds}


def _too_long(
    model: ResidentModel, name: str, loaded: Sequence[TaskExamples], batch_size: int
) -> Iterator[str]:
    """Yield a warning for each task with rows beyond the model's maximum length.

    Raises InputError for a row that is too long for the memory.
    """
    for each in loaded:
        check_memory(each.task, each.examples, model, batch_size)
        if count := count_too_long(each.task, each.examples, model):
            yield (
                f"{each.task.task}: {count:,} of {len(each.examples):,} rows can take more, with "
                f"their answers, than the {model.max_length:,} tokens that "
                f"{short_name(name)} was made for; nothing is truncated"
            )


def _score_tasks(
    model: ResidentModel,
    checkpoint: Checkpoint,
    loaded: Sequence[TaskExamples],
    options: EvaluateOptions,
    clock: Clock,
    report_done: Callable[[str, int], None],
) -> Iterator[tuple[TaskExamples, Scored]]:
    """Load a model's weights, and yield each task with its scored answers."""
    if not loaded:
        return
    with clock.stage("loading"):
        model = with_weights(model, checkpoint)
        model = replace(model, params=jax.device_put(model.params))
    dtype = compute_dtype(options.compute_dtype, checkpoint)
    for each in loaded:
        name = each.task.task
        progress = partial(report_done, f"{name}, {short_name(checkpoint.name)}")
        progress(0)
        try:
            with clock.stage(name):
                scored = score(
                    each.task,
                    each.examples,
                    model,
                    batch_size=options.batch_size,
                    dtype=dtype,
                    progress=progress,
                )
        except InputError as error:
            raise InputError(f"{checkpoint.name}, {name}: {error}") from error
        yield each, scored


@contextmanager
def _open_output(
    out: Path | None,
    checkpoints: Sequence[Checkpoint],
    loaded: Sequence[TaskExamples],
    options: EvaluateOptions,
) -> Iterator[tuple[Path | None, EvaluationJournal]]:
    """Yield the folder that becomes `out`, if it is given, and the journal of finished tasks."""
    identity = _identity(checkpoints, loaded, options)
    if out is None:
        yield None, EvaluationJournal(None, identity)
        return
    inputs = [path for each in loaded for path in each.files]
    inputs += [path for model in checkpoints for path in (model.folder, *model.adapters)]
    with work_folder(out, force=options.force, resume=options.resume, inputs=inputs) as work:
        if options.resume:
            yield work.folder, resume_evaluation_journal(work.journal, identity)
        else:
            yield work.folder, EvaluationJournal(work.journal, identity)


def _identity(
    checkpoints: Sequence[Checkpoint], loaded: Sequence[TaskExamples], options: EvaluateOptions
) -> dict[str, Any]:
    """Return the identity of an evaluation, which a resumed one must share."""
    return {
        "models": [model.fingerprint() for model in checkpoints],
        "tasks": [each.task.model_dump(mode="json") for each in loaded],
        "rows": [each.digest() for each in loaded],
        "options": [options.batch_size, options.compute_dtype, list(options.ignore_config)],
        "versions": {**versions(), "device": device()},
    }


def _record(
    models: Sequence[str],
    names: Sequence[str],
    loaded: Sequence[TaskExamples],
    results: TaskMetrics,
    options: EvaluateOptions,
) -> dict[str, Any]:
    return {
        "format": 1,
        "models": [
            {"model": model, "predictions": f"{PREDICTIONS}/{name}"}
            for model, name in zip(models, names, strict=True)
        ],
        "tasks": [
            {
                "task": each.task.task,
                "metrics": list(headline(each.task)),
                "rows": len(each.examples),
                "rows_in_all": each.total,
                "source": each.source,
                "first_prompt": each.examples[0].prompt,
                "definition": each.task.model_dump(mode="json", exclude_none=True),
            }
            for each in loaded
        ],
        "results": [
            {
                each.task.task: {
                    metric: estimate._asdict()
                    for metric, estimate in results[k, each.task.task].items()
                }
                for each in loaded
            }
            for k in range(len(models))
        ],
        "settings": {
            "limit": options.limit,
            "seed": options.seed,
            "batch_size": options.batch_size,
            "compute_dtype": options.compute_dtype,
            "ignore_config": list(options.ignore_config),
        },
        "versions": versions() | _scorers(loaded),
        "device": device(),
    }


def _scorers(loaded: Sequence[TaskExamples]) -> dict[str, str]:
    """Return the versions of other software that computes some of the metrics."""
    uses_bleu = any(BLEU in headline(each.task) for each in loaded)
    return {"sacrebleu": version("sacrebleu")} if uses_bleu else {}


def _write_predictions(path: Path, scored: Scored) -> None:
    with storage_faults(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, scored.predictions)


def _write(folder: Path, record: dict[str, Any]) -> None:
    page = render_evaluation(record)
    with storage_faults(f"write {folder}"):
        write_json_object(folder / RECORD, record, ensure_ascii=False)
        (folder / PAGE).write_text(page, encoding="utf-8")


def _file_name(model: str) -> str:
    """Return a model's name in a form for folders."""
    return re.sub(r"[^\w.+-]", "_", short_name(model, 60))
