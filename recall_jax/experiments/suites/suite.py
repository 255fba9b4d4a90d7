"""Make a suite: rows, a base that half knows every task, and a fine-tune for each of them.

The folder is created with its rows and the random weights that the base starts from. Models are
then added one by one, each absent or complete, so that running the command again continues an
interrupted suite.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recall_jax.errors import InputError, storage_faults
from recall_jax.evaluation.rows import load_rows
from recall_jax.evaluation.task import find_task
from recall_jax.experiments.suites.scratch import save_random
from recall_jax.files.json_objects import read_json_object, write_json_object
from recall_jax.files.output import output_folder
from recall_jax.files.progress import Progress, silent
from recall_jax.inputs.data import write_jsonl
from recall_jax.jobs.finetune import finetune
from recall_jax.parallel.machine import device, versions
from recall_jax.training.settings import TrainingSettings

RECORD, START, BASE, DATA = "suite.json", "start", "base", "data"
_MIXED = "base.train.jsonl"

SuiteRows = list[Any]


@dataclass(frozen=True)
class Stage:
    """Set the number of rows (for a base, of all tasks together) and how to train on them."""

    rows: int
    epochs: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class Suite:
    """Describe a suite; everything in it is drawn by `seed`.

    `sizes` are attributes of the models' config, `words` their tokens of more than a byte.
    `draw_base(tasks, count, seed)` returns rows for the base, `draw(task, count, seed)` rows for a
    fine-tune, and `provenance(tasks)` what else the rows depend on. Held-out rows are those of the
    evaluation tasks `<name>_<task>`, independently of the seed.
    """

    name: str
    tasks: tuple[str, ...]
    seed: int
    sizes: Mapping[str, int]
    words: tuple[str, ...]
    base: Stage
    fine_tune: Stage
    draw_base: Callable[[Sequence[str], int, int], SuiteRows]
    draw: Callable[[str, int, int], SuiteRows]
    provenance: Callable[[Sequence[str]], dict[str, Any]] = lambda tasks: {}

    def definition(self) -> dict[str, Any]:
        """Return the identity of the suite as JSON values."""
        return {
            "suite": self.name,
            "tasks": list(self.tasks),
            "seed": self.seed,
            "sizes": dict(self.sizes),
            "base": dataclasses.asdict(self.base),
            "fine_tune": dataclasses.asdict(self.fine_tune),
        }


def make_suite(
    suite: Suite,
    out: Path,
    tasks: Sequence[str] | None = None,
    *,
    force: bool = False,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make the models that `out` lacks: the base, and the fine-tunes of `tasks` (default: all).

    Returns the record in `suite.json`. Raises InputError for an unknown task, and if `out` is
    something else or another suite, unless `force` replaces it.
    """
    wanted = suite.tasks if tasks is None else tasks
    if unknown := [task for task in wanted if task not in suite.tasks]:
        raise InputError(
            f"suite {suite.name} has no task {unknown[0]!r}: choose from {', '.join(suite.tasks)}"
        )
    record = _create(suite, out, force)
    for model in (BASE, *wanted):
        if (out / model).exists():
            announce(f"{model}: kept")
            continue
        done = finetune(
            str(out / (START if model == BASE else BASE)),
            out / model,
            _settings(suite, out, model),
            progress=lambda doing, *at, _model=model, **details: progress(
                f"{_model}: {doing}", *at, **details
            ),
        )
        losses, seconds = done["losses"], done["timing_s"]["training"]
        announce(
            f"{model}: {len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}, "
            f"{seconds:.0f} s"
        )
    return record


def _create(suite: Suite, out: Path, force: bool) -> dict[str, Any]:
    """Return the record of the suite in `out`; creates it with rows and random weights if new."""
    definition = suite.definition()
    if (out / RECORD).is_file() and not force:
        found = read_json_object(out / RECORD)
        for key, value in definition.items():
            if found.get(key) != value:
                raise InputError(
                    f"{out} holds a suite with {key} {found.get(key)}, not {value}: choose another "
                    "folder or pass --force"
                )
        return found
    record = {
        "format": 1,
        **definition,
        "rows": suite.provenance(suite.tasks),
        "versions": versions(),
        "device": device(),
    }
    with output_folder(out, force=force) as folder, storage_faults(f"write {out}"):
        _write_rows(suite, folder / DATA)
        save_random(folder / START, suite.sizes, suite.words, suite.seed)
        write_json_object(folder / RECORD, record)
    return record


def _write_rows(suite: Suite, folder: Path) -> None:
    folder.mkdir()
    mixed = suite.draw_base(suite.tasks, suite.base.rows, suite.seed)
    write_jsonl(folder / _MIXED, mixed)
    for task in suite.tasks:
        rows = suite.draw(task, suite.fine_tune.rows, suite.seed)
        write_jsonl(folder / f"{task}.train.jsonl", rows)
        held_out = load_rows(find_task(f"{suite.name}_{task}"), None)
        write_jsonl(folder / f"{task}.test.jsonl", held_out.rows)


def _settings(suite: Suite, out: Path, model: str) -> TrainingSettings:
    stage = suite.base if model == BASE else suite.fine_tune
    return TrainingSettings(
        data=str(out / DATA / f"{model}.train.jsonl"),
        max_tokens=suite.sizes["max_position_embeddings"],
        epochs=stage.epochs,
        batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        warmup=0.1,
        weight_decay=0.01,
        seed=suite.seed,
        save_every=0,  # a model takes minutes, so an interrupted one is not resumed
        out_dtype="bfloat16",
    )
