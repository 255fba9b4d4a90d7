"""The rows of a task: of files below the data root, of the hub, or of a generator."""

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
    """Rows of a task, the number of each in its split, and where each stands, for errors."""

    rows: tuple[Row, ...]
    numbers: tuple[int, ...]
    places: tuple[str, ...]
    source: str
    files: tuple[Path, ...] = ()

    def draw(self, limit: int | None, seed: int) -> "TaskRows":
        """At most `limit` of the rows, drawn by `seed` without replacement, in their order."""
        if limit is None or limit >= len(self.rows):
            return self
        keep = draw_indices(len(self.rows), limit, seed).tolist()
        return TaskRows(
            tuple(self.rows[place] for place in keep),
            tuple(self.numbers[place] for place in keep),
            tuple(self.places[place] for place in keep),
            self.source,
            self.files,
        )


def load_rows(task: Task, data_root: Path | None) -> TaskRows:
    """All rows of the task's split.

    Of files in `data_root`/`task.task` if there is a data root, else of the hub. Raises InputError,
    which says what to put where.
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
    raise InputError(f"{folder} has no rows of {task.task}: {_wanted(task, source)} there")


def _load(task: Task, source: Published) -> TaskRows:
    advice = f"{_wanted(task, source)} into DIR/{task.task} and name DIR as evaluate.data_root"
    if source.hub is None:
        raise InputError(f"no rows of {task.task}: {advice}")
    asked = source.hub.model_dump(exclude_none=True)
    name = ", ".join(asked.values())
    try:
        rows = hub.load_split(task.split, **asked)
    except InputError as error:
        raise InputError(f"no rows of {task.task}, {name} of the hub: {error}; {advice}") from error
    return _number([(f"{name}, {task.split}", rows)], f"{name} of the hub, {task.split}")


def _wanted(task: Task, source: Published) -> str:
    return f"put {' or '.join(each.files for each in source.splits[task.split])}"


def _number(
    parts: Sequence[tuple[str, Sequence[Row]]], source: str, files: Sequence[Path] = ()
) -> TaskRows:
    places = [f"{name}, row {index} (from 0)" for name, rows in parts for index in range(len(rows))]
    rows = tuple(row for _, rows in parts for row in rows)
    return TaskRows(rows, tuple(range(len(rows))), tuple(places), source, tuple(files))
