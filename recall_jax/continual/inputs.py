"""What a run reads, looked at before anything is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.continual.lineage import Merged, Model, Tuned, ancestry
from recall_jax.continual.plan import Run
from recall_jax.continual.recipe import Protocol
from recall_jax.engine.inputs import common_architecture
from recall_jax.engine.journal import input_files
from recall_jax.errors import InputError
from recall_jax.evaluate import Asked, Options, ask
from recall_jax.evaluation.resident import without_weights
from recall_jax.evaluation.task import Task, find_task
from recall_jax.outcome import device, versions
from recall_jax.recipe import make_recipe
from recall_jax.representations.data import read_rows


def find_columns(protocol: Protocol) -> dict[str, Task]:
    """The evaluation task of each task that is learnt, by its name, and of the unseen ones."""
    columns = {task.name: find_task(task.task) for task in protocol.tasks}
    learnt = [task.task for task in columns.values()]
    for asked in protocol.unseen:
        task = find_task(asked)
        if task.task in learnt or task.task in columns:
            raise InputError(f"unseen: {asked} is among the tasks that are learnt: remove it there")
        columns[task.task] = task
    return columns


def ask_all(columns: dict[str, Task], options: Options) -> list[Asked]:
    """The examples of each evaluation task, once for those of one name. Raises InputError."""
    tasks = {task.task: task for task in columns.values()}
    return [ask(task, options) for task in tasks.values()]


def data_files(models: Sequence[Model]) -> list[Path]:
    """Every file of rows that models are made from."""
    files = [
        path
        for model in ancestry(models).values()
        for path in (model.data if isinstance(model, Tuned | Merged) else ())
        if path is not None
    ]
    return [Path(path) for path in dict.fromkeys(files)]


def check_inputs(runs: Sequence[Run], models: Sequence[Model]) -> dict[str, Any]:
    """The files that the runs read, as a journal knows them; InputError for what is wrong there."""
    files = data_files(models)
    for path in files:
        read_rows(path)
    inputs: dict[str, Any] = {}
    for name in dict.fromkeys(run.base.name for run in runs):
        base = open_checkpoint(name)
        common_architecture([base])
        without_weights(base)
        inputs |= input_files([base], files)
    for model in ancestry(models).values():
        if isinstance(model, Merged):
            make_recipe(model.values(lambda part: part.name), f"strategy of {model.label}")
    return inputs


def identify(inputs: dict[str, Any], asked: Sequence[Asked], options: Options) -> dict[str, Any]:
    """What all models and scores depend on, beside how the models are defined."""
    return {
        "inputs": inputs,
        "evaluated": {
            "tasks": [each.task.model_dump(mode="json") for each in asked],
            "rows": [each.digest() for each in asked],
            "options": [options.batch_size, options.compute_dtype],
        },
        "program": {**versions(), "device": device()},
    }
