"""Load the rows of a task from files below the data root, from the hub, or from a generator."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recall_jax.errors import InputError, shown
from recall_jax.evaluation import hub
from recall_jax.evaluation.generators import GENERATORS
from recall_jax.evaluation.layouts import read_layout
from recall_jax.evaluation.task import Generated, Published, Task
from recall_jax.inputs.data import draw_indices
from recall_jax.inputs.row_files import Row


@dataclass(frozen=True)
class TaskRows:
    """Hold rows of a task, the number of each in its split, and its place as errors name it.

    `source` describes where the rows came from, and `files` are those that were read.
    """

    rows: tuple[Row, ...]
    numbers: tuple[int, ...]
    places: tuple[str, ...]
    source: str
    files: tuple[Path, ...] = ()

    def draw(self, limit: int | None, seed: int) -> "TaskRows":
        """Draw at most `limit` of the rows by `seed`, without replacement, in order."""
        if limit is None or limit >= len(self.rows):
            return self
        drawn = draw_indices(len(self.rows), limit, seed).tolist()
        return TaskRows(
            tuple(self.rows[index] for index in drawn),
            tuple(self.numbers[index] for index in drawn),
            tuple(self.places[index] for index in drawn),
            self.source,
            self.files,
        )


def load_rows(task: Task, data_root: Path | None) -> TaskRows:
    """Load all rows of the task's split.

    They come from its generator, from files in `data_root`/`task.task` if there is a data root, or
    from the hub. Raises InputError, which says which files to put where, if they are not found.
    """
    if isinstance(task.source, Generated):
        return _generate(task.source)
    if data_root is not None:
        return _read(task, task.source, data_root / task.task)
    return _load(task, task.source)


def _generate(source: Generated) -> TaskRows:
    if source.generator not in GENERATORS:
        known = ", ".join(GENERATORS) or "none"
        raise InputError(f"no generator {shown(source.generator)} of rows: known are {known}")
    rows = GENERATORS[source.generator](source.task, source.count, source.seed)
    return _number([(f"{source.generator} {source.task}", rows)], "generated")


def _read(task: Task, source: Published, folder: Path) -> TaskRows:
    for files in source.splits[task.split]:
        if found := sorted(path for path in folder.glob(files.files) if path.is_file()):
            read = [(str(path), read_layout(path, files.layout)) for path in found]
            return _number(read, str(folder / files.files), found)
    raise InputError(f"{folder} has no rows of {task.task}: {_advice(task, source)} there")


def _load(task: Task, source: Published) -> TaskRows:
    advice = f"{_advice(task, source)} into DIR/{task.task} and name DIR as evaluate.data_root"
    if source.hub is None:
        raise InputError(f"no rows of {task.task}: {advice}")
    arguments = source.hub.model_dump(exclude_none=True)
    name = ", ".join(arguments.values())
    try:
        rows = hub.load_split(task.split, **arguments)
    except InputError as error:
        raise InputError(f"no rows of {task.task}, {name} of the hub: {error}; {advice}") from error
    return _number([(f"{name}, {task.split}", rows)], f"{name} of the hub, {task.split}")


def _advice(task: Task, source: Published) -> str:
    return f"put {' or '.join(each.files for each in source.splits[task.split])}"


def _number(
    parts: Sequence[tuple[str, Sequence[Row]]], source: str, files: Sequence[Path] = ()
) -> TaskRows:
    places = [f"{name}, row {index} (from 0)" for name, rows in parts for index in range(len(rows))]
    rows = tuple(row for _, rows in parts for row in rows)
    return TaskRows(rows, tuple(range(len(rows))), tuple(places), source, tuple(files))
