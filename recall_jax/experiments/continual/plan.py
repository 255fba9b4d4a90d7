"""Plan the runs of a recipe: for each strategy, order and seed, the model after each task."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from recall_jax.errors import InputError, shown
from recall_jax.experiments.continual.lineage import Given, MergedModel, Model, Tuned
from recall_jax.experiments.continual.recipe import (
    MergeSettings,
    Protocol,
    Strategy,
    filled,
    fine_tuning_values,
)
from recall_jax.methods.registry import METHODS
from recall_jax.models.lora import LoraSpec
from recall_jax.training.settings import TrainingSettings


@dataclass(frozen=True)
class Learnt:
    """Hold a task of a run: its name, and the file of rows to learn it from."""

    name: str
    data: str


@dataclass(frozen=True)
class Run:
    """Describe a strategy applied to an order of tasks, with all random draws by `seed`.

    `stages` has the model after each of the tasks, None if it is not evaluated; `order` is the
    index of the order in the recipe.
    """

    strategy: str
    order: int
    seed: int
    base: Given
    tasks: tuple[str, ...]
    stages: tuple[Model | None, ...]

    @property
    def name(self) -> str:
        """Return the name of the run's files."""
        return f"{self.strategy}-{self.order}-{self.seed}"

    @property
    def final(self) -> Model:
        """Return the model after the last task."""
        assert self.stages[-1] is not None
        return self.stages[-1]


def plan_runs(protocol: Protocol) -> list[Run]:
    """Return all runs, sorted by seed and order; InputError for invalid strategies.

    A strategy that trains on all tasks at once runs only once for each seed and set of tasks.
    """
    runs = []
    for seed, (index, order) in product(protocol.seeds, enumerate(protocol.orders)):
        base = Given(str(filled(protocol.base_model, seed)))
        rows = {task.name: str(filled(task.data, seed)) for task in protocol.tasks}
        tasks = [Learnt(name, rows[name]) for name in order]
        for name, strategy in protocol.strategies.items():
            earlier = protocol.orders[:index]
            if strategy.joint and any(set(order) == set(other) for other in earlier):
                continue
            try:
                stages = list(_stages(protocol, strategy, base, tasks, seed))
            except InputError as error:
                raise InputError(f"strategies.{name}: {error}") from error
            if protocol.evaluate.stages == "last":
                stages[:-1] = [None] * (len(stages) - 1)
            runs.append(Run(name, index, seed, base, tuple(order), tuple(stages)))
    return runs


def _stages(
    protocol: Protocol, strategy: Strategy, base: Given, tasks: Sequence[Learnt], seed: int
) -> Iterator[Model | None]:
    """Yield the model of a strategy after each task."""
    settings = _settings(protocol, strategy, seed)
    if strategy.joint:
        yield from [None] * (len(tasks) - 1)
        yield _joint(protocol, base, tasks, settings)
    elif strategy.merge is None:
        yield from _chain(base, tasks, settings)
    else:
        yield from _merges(protocol, strategy, strategy.merge, base, tasks, settings)


def _joint(
    protocol: Protocol, base: Given, tasks: Sequence[Learnt], settings: dict[str, Any]
) -> Tuned:
    """Return the base fine-tuned on the rows of all tasks, independently of their order."""
    rows = {task.name: task.data for task in tasks}
    files = tuple(rows[task.name] for task in protocol.tasks if task.name in rows)
    return Tuned(base, files, TrainingSettings(data=files[0], **settings), label="joint")


def _chain(base: Given, tasks: Sequence[Learnt], settings: dict[str, Any]) -> Iterator[Model]:
    """Yield models that are each fine-tuned from the previous one."""
    models: list[Model] = []
    for task in tasks:
        models.append(_fine_tuned(models[-1] if models else base, task, settings, models))
        yield models[-1]


def _merges(
    protocol: Protocol,
    strategy: Strategy,
    merge: MergeSettings,
    base: Given,
    tasks: Sequence[Learnt],
    settings: dict[str, Any],
) -> Iterator[Model]:
    """Yield after each task its expert merged with earlier experts, or with the last merge."""
    merged: Model = base
    experts: list[Model] = []
    rows: list[str | None] = []
    for task in tasks:
        start = {"base": base, "merged": merged, "expert": experts[-1] if experts else base}
        experts.append(_fine_tuned(start[strategy.start], task, settings, []))
        rows.append(task.data)
        kept = (merged, *experts[-1:]) if strategy.keeps == "merged" else (base, *experts)
        known = (None, *rows[1 - len(kept) :])
        if kept[0] == base and not merge.with_base:
            kept, known = kept[1:], known[1:]
        merged = _merged(protocol, merge, base, kept, known, settings["seed"])
        yield merged


def _settings(protocol: Protocol, strategy: Strategy, seed: int) -> dict[str, Any]:
    """Return the settings of a strategy's fine-tunings, without their data.

    Of the protocol's settings, those of LoRA apply only with `method: lora`, and `out_dtype` only
    with other methods.
    """
    shared, specific = fine_tuning_values(protocol), fine_tuning_values(strategy)
    method = {**shared, **specific}.get("method", "full")
    lora = shared.pop("lora", {})
    if method == "lora":
        shared.pop("out_dtype", None)
        specific["lora"] = LoraSpec(**{**lora, **specific.get("lora", {})})
    settings = {"ignore_config": protocol.ignore_config, **shared, **specific, "seed": seed}
    if method == "ewc" and (strategy.merge or strategy.joint):
        raise InputError("method ewc is for chains of fine-tunings: remove merge or joint")
    if method == "ewc" and "ewc_strength" not in settings:
        raise InputError("method ewc needs finetune.ewc_strength")
    return settings


def _fine_tuned(
    start: Model, task: Learnt, settings: dict[str, Any], earlier: Sequence[Model]
) -> Tuned:
    """Return `start` fine-tuned on a task; EWC uses the anchors of models of earlier tasks."""
    anchors: Sequence[Model] = ()
    if settings.get("method") == "ewc":
        anchors = earlier[-1:] if "ewc_decay" in settings else earlier
        settings = settings | {"save_fisher": True}
        if anchors:
            settings |= {"ewc_fisher": tuple(anchor.name for anchor in anchors)}
        else:
            inapplicable = {"method", "ewc_strength", "ewc_decay"}
            settings = {key: value for key, value in settings.items() if key not in inapplicable}
    made = TrainingSettings(data=task.data, **settings)
    return Tuned(start, (task.data,), made, tuple(anchors), label=task.name)


def _merged(
    protocol: Protocol,
    merge: MergeSettings,
    base: Given,
    models: Sequence[Model],
    known: Sequence[str | None],
    seed: int,
) -> Model:
    """Return the merge of the models, or a single model if the method needs several."""
    if merge.merge_method not in METHODS:
        known_methods = ", ".join(METHODS)
        raise InputError(
            f"no merge_method {shown(merge.merge_method)}: choose from {known_methods}"
        )
    needs = METHODS[merge.merge_method].needs
    if len(models) < needs.models:
        return models[-1]
    recipe = merge.model_dump(exclude_none=True, exclude={"with_base", "samples"})
    if protocol.ignore_config:
        recipe["ignore_config"] = protocol.ignore_config
    samples = {"seed": seed, **protocol.samples, **merge.samples}
    data: Sequence[str | None] = [None] * len(models)
    if needs.samples != "none":
        if samples.get("source", "data") == "data":
            if needs.samples == "each":
                data = known
            samples.setdefault("data", known[-1])
        recipe["samples"] = samples
    text = json.dumps(filled(recipe, seed), sort_keys=True)
    return MergedModel(
        tuple(models),
        tuple(data),
        base if needs.base else None,
        text,
        label=merge.merge_method,
    )
