"""What a run reads, looked at before anything is trained."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recall_jax.checkpoint.folder import Checkpoint, open_checkpoint
from recall_jax.engine.inputs import read_samples, tokenizer_of
from recall_jax.engine.journal import input_files
from recall_jax.engine.labels import label_tokens
from recall_jax.engine.select import clustered_units
from recall_jax.errors import InputError
from recall_jax.evaluation.resident import without_weights
from recall_jax.evaluation.task import Task, find_task
from recall_jax.experiments.continual.lineage import MergedModel, Model, Tuned, ancestry
from recall_jax.experiments.continual.plan import Run
from recall_jax.experiments.continual.recipe import Protocol
from recall_jax.inputs.row_files import iterate_rows
from recall_jax.inputs.settings import FIELD_KEYS, Samples
from recall_jax.inputs.shapes import Fields, row_content
from recall_jax.jobs.evaluate import EvaluateOptions, TaskExamples, load_task_examples
from recall_jax.jobs.finetune import check
from recall_jax.methods.values import values_of
from recall_jax.models.architecture import Architecture
from recall_jax.models.lora import adapted_modules
from recall_jax.parallel.machine import device, versions
from recall_jax.recipes.recipe import make_recipe

_FILES = ("data", "typical", "prompts")  # what a recipe's `samples` may read


def find_columns(protocol: Protocol) -> dict[str, Task]:
    """The evaluation task of each task that is learnt, by its name, and of the unseen ones."""
    columns = {task.name: find_task(task.task) for task in protocol.tasks}
    learnt = [task.task for task in columns.values()]
    for asked in protocol.unseen:
        task = find_task(asked)
        if task.task in learnt or task.task in columns:
            known = "among the tasks that are learnt" if task.task in learnt else "named already"
            raise InputError(f"unseen: {asked} is {known}: remove it there")
        columns[task.task] = task
    return columns


def ask_all(columns: dict[str, Task], options: EvaluateOptions) -> list[TaskExamples]:
    """The examples of each evaluation task, once for those of one name. Raises InputError."""
    tasks = {task.task: task for task in columns.values()}
    return [load_task_examples(task, options) for task in tasks.values()]


def data_files(models: Sequence[Model]) -> list[Path]:
    """Every file of rows that models are made from."""
    return list(dict.fromkeys(path for path, _ in _asked_rows(models)))


def check_inputs(
    runs: Sequence[Run],
    models: Sequence[Model],
    ignore_config: Collection[str] = (),
    plugins: Sequence[Path] = (),
) -> dict[str, Any]:
    """The files that the runs read, as a journal knows them; InputError for what is wrong there."""
    for path, fields in dict.fromkeys(_asked_rows(models)):
        for index, row in enumerate(iterate_rows(path)):
            if fields is not None:
                row_content(row, f"{path}, row {index} (from 0)", fields)
    files = [*data_files(models), *plugins]
    inputs: dict[str, Any] = {}
    for name in dict.fromkeys(run.base.name for run in runs):
        base = open_checkpoint(name)
        arch = without_weights(base, ignore_config).arch
        inputs |= input_files([base], files)
        mine = [model for run in runs if run.base.name == name for model in run.stages if model]
        checked: set[str] = set()
        for model in ancestry(mine).values():
            if isinstance(model, MergedModel):
                _check_merge(model, base, arch, checked)
            elif isinstance(model, Tuned):
                _check_fine_tuning(model, base, arch, checked)
    return inputs


def _asked_rows(models: Sequence[Model]) -> Iterator[tuple[Path, Fields | None]]:
    """Files of rows, with the fields that all their rows must have, None where there are none."""
    for model in ancestry(models).values():
        if isinstance(model, Tuned):
            yield from ((Path(path), model.settings.fields) for path in model.data)
        elif isinstance(model, MergedModel):
            samples = json.loads(model.recipe).get("samples", {})
            fields = Fields(*map(samples.get, FIELD_KEYS))
            yield from ((Path(path), fields) for path in model.data if path is not None)
            yield from ((Path(samples[key]), None) for key in _FILES if samples.get(key))


def _check_fine_tuning(
    model: Tuned, base: Checkpoint, arch: Architecture, checked: set[str]
) -> None:
    """InputError for rows, or settings with them, that cannot be learnt.

    What was `checked` before, of another seed or from another model, is not again.
    """
    if model.settings.lora is not None:
        adapted_modules(arch, model.settings.lora)
    settings = replace(model.settings, seed=0)
    if len(model.data) > 1:  # how many there are together is seen when they are
        settings = replace(settings, warmup=0.0, validation_share=None)
        settings = replace(settings, patience=None, evaluate_every=None)
    for path in model.data:
        own = replace(settings, data=path)
        if repr(own) not in checked:
            check(own, base)
        checked.add(repr(own))


def _check_merge(
    model: MergedModel, base: Checkpoint, arch: Architecture, checked: set[str]
) -> None:
    """InputError for a merge that could not be of models of this architecture, or of its rows."""
    where = f"strategy of {model.label}"
    recipe = make_recipe(model.values(lambda part: part.name), where)
    samples, labelled = recipe.samples, recipe.needs.labelled
    try:
        values_of(recipe.parameters, recipe.models, base.specs)
        if samples is not None:
            clustered_units(samples.unit, arch)
            _check_samples(samples, model.data, labelled, base, arch, checked)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _check_samples(
    samples: Samples,
    data: Sequence[str | None],
    labelled: bool,
    base: Checkpoint,
    arch: Architecture,
    checked: set[str],
) -> None:
    """InputError for rows that the models cannot be run on."""
    given = [samples.model_copy(update={"data": path, "typical": None}) for path in data if path]
    if samples.source == "data" and (samples.data or samples.typical):
        given.append(samples)
    for own in given:
        what = f"{labelled} {own.model_copy(update={'seed': 0})!r}"
        if what not in checked:
            rows = read_samples(own, base, [base], arch)
            if labelled:
                label_tokens(rows, own, base, tokenizer_of(base, [base], arch))
        checked.add(what)


def identify(
    inputs: dict[str, Any], asked: Sequence[TaskExamples], options: EvaluateOptions
) -> dict[str, Any]:
    """What all models and scores depend on, beside how the models are defined."""
    return {
        "inputs": inputs,
        "evaluated": {
            "tasks": [each.task.model_dump(mode="json") for each in asked],
            "rows": [each.digest() for each in asked],
            "options": [options.batch_size, options.compute_dtype, list(options.ignore_config)],
        },
        "program": {**versions(), "device": device()},
    }
