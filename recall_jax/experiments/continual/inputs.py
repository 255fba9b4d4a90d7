"""Check all inputs of a continual-learning run before anything is trained."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recall_jax.checkpoint.folder import Checkpoint, open_checkpoint
from recall_jax.engine.inputs import model_tokenizer, read_samples
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
from recall_jax.methods.values import tensor_values
from recall_jax.models.architecture import Architecture
from recall_jax.models.lora import adapted_modules
from recall_jax.parallel.machine import device, versions
from recall_jax.recipes.recipe import make_recipe

_FILES = ("data", "typical", "prompts")  # keys of a recipe's `samples` that name files


def find_columns(protocol: Protocol) -> dict[str, Task]:
    """Return the evaluation task of each learnt task, by its name, and the unseen ones."""
    columns = {task.name: find_task(task.task) for task in protocol.tasks}
    learnt = [task.task for task in columns.values()]
    for name in protocol.unseen:
        task = find_task(name)
        if task.task in learnt or task.task in columns:
            known = "among the tasks that are learnt" if task.task in learnt else "named already"
            raise InputError(f"unseen: {name} is {known}: remove it there")
        columns[task.task] = task
    return columns


def load_columns(columns: dict[str, Task], options: EvaluateOptions) -> list[TaskExamples]:
    """Load the examples of each distinct evaluation task; InputError for missing or bad rows."""
    tasks = {task.task: task for task in columns.values()}
    return [load_task_examples(task, options) for task in tasks.values()]


def data_files(models: Sequence[Model]) -> list[Path]:
    """Return all files of rows that models are made from."""
    return list(dict.fromkeys(path for path, _ in _row_files(models)))


def check_inputs(
    runs: Sequence[Run],
    models: Sequence[Model],
    ignore_config: Collection[str] = (),
    plugins: Sequence[Path] = (),
) -> dict[str, Any]:
    """Check models, rows and settings of all runs; return the identities of the files read.

    Raises InputError for a fault in any of them.
    """
    for path, fields in dict.fromkeys(_row_files(models)):
        for index, row in enumerate(iterate_rows(path)):
            if fields is not None:
                row_content(row, f"{path}, row {index} (from 0)", fields)
    files = [*data_files(models), *plugins]
    inputs: dict[str, Any] = {}
    for name in dict.fromkeys(run.base.name for run in runs):
        base = open_checkpoint(name)
        arch = without_weights(base, ignore_config).arch
        inputs |= input_files([base], files)
        from_base = [
            model for run in runs if run.base.name == name for model in run.stages if model
        ]
        checked: set[str] = set()
        for model in ancestry(from_base).values():
            if isinstance(model, MergedModel):
                _check_merge(model, base, arch, checked)
            elif isinstance(model, Tuned):
                _check_fine_tuning(model, base, arch, checked)
    return inputs


def _row_files(models: Sequence[Model]) -> Iterator[tuple[Path, Fields | None]]:
    """Yield files of rows, with the fields that all rows must have, None for any fields."""
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
    """Raise InputError if the rows or the settings cannot be used for fine-tuning.

    Combinations in `checked`, with another seed or from another model, are skipped.
    """
    if model.settings.lora is not None:
        adapted_modules(arch, model.settings.lora)
    settings = replace(model.settings, seed=0)
    if len(model.data) > 1:  # these depend on the number of rows in all files
        settings = replace(settings, warmup=0.0, validation_share=None)
        settings = replace(settings, patience=None, evaluate_every=None)
    for path in model.data:
        with_data = replace(settings, data=path)
        if repr(with_data) not in checked:
            check(with_data, base)
        checked.add(repr(with_data))


def _check_merge(
    model: MergedModel, base: Checkpoint, arch: Architecture, checked: set[str]
) -> None:
    """Raise InputError for a merge that is impossible for this architecture or these rows."""
    where = f"strategy of {model.label}"
    recipe = make_recipe(model.values(lambda part: part.name), where)
    samples, labelled = recipe.samples, recipe.needs.labelled
    try:
        tensor_values(recipe.parameters, recipe.models, base.specs)
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
    """Raise InputError for rows that the models cannot run on."""
    to_check = [samples.model_copy(update={"data": path, "typical": None}) for path in data if path]
    if samples.source == "data" and (samples.data or samples.typical):
        to_check.append(samples)
    for each in to_check:
        key = f"{labelled} {each.model_copy(update={'seed': 0})!r}"
        if key not in checked:
            rows = read_samples(each, base, [base], arch)
            if labelled:
                label_tokens(rows, each, base, model_tokenizer(base, [base], arch))
        checked.add(key)


def identify(
    inputs: dict[str, Any], tasks: Sequence[TaskExamples], options: EvaluateOptions
) -> dict[str, Any]:
    """Return what all models and scores depend on, except the definitions of the models."""
    return {
        "inputs": inputs,
        "evaluated": {
            "tasks": [each.task.model_dump(mode="json") for each in tasks],
            "rows": [each.digest() for each in tasks],
            "options": [options.batch_size, options.compute_dtype, list(options.ignore_config)],
        },
        "program": {**versions(), "device": device()},
    }
