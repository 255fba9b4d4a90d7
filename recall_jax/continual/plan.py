"""From a recipe to runs: for each strategy, order and seed the model after each task."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from recall_jax.continual.lineage import Given, Merged, Model, Tuned
from recall_jax.continual.recipe import Merge, Protocol, Strategy, filled, fine_tuning_values
from recall_jax.errors import InputError
from recall_jax.merging.methods import METHODS
from recall_jax.models.lora import LoraSpec
from recall_jax.training.settings import Settings


@dataclass(frozen=True)
class Learnt:
    """A task of a run: its name, and the file of rows that it is learnt from."""

    name: str
    data: str


@dataclass(frozen=True)
class Run:
    """A strategy going through an order of tasks, everything random drawn by `seed`.

    `stages` has the model after each of the tasks, None where none is to be evaluated; `order` is
    the index of the order in the recipe.
    """

    strategy: str
    order: int
    seed: int
    base: Given
    tasks: tuple[str, ...]
    stages: tuple[Model | None, ...]

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.strategy}-{self.order}-{self.seed}"

    @property
    def final(self) -> Model:
        """The model after the last task."""
        assert self.stages[-1] is not None
        return self.stages[-1]


def plan_runs(protocol: Protocol) -> list[Run]:
    """All runs; those of a seed and of an order stand together. Raises InputError.

    What trains on all tasks at once has no order: it runs once for each seed.
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
    """The model of a strategy after each task."""
    settings = _settings(protocol, strategy, seed)
    if strategy.joint:
        files = [task.data for task in protocol.tasks if _is_among(task.name, tasks)]
        paths = tuple(str(filled(path, seed)) for path in files)
        yield from [None] * (len(tasks) - 1)
        yield Tuned(base, paths, Settings(data=paths[0], **settings), label="joint")
        return
    experts: list[Model] = []
    merged: Model = base
    for count, task in enumerate(tasks, start=1):
        last = experts[-1] if experts else base
        if strategy.merge is None:
            experts.append(_fine_tuned(last, task, settings, experts))
            yield experts[-1]
            continue
        start = {"base": base, "merged": merged, "expert": last}[strategy.start]
        experts.append(_fine_tuned(start, task, settings, []))
        if strategy.keeps == "merged":
            kept, known = [merged, experts[-1]], [None, task.data]
        else:
            kept, known = [base, *experts], [None, *(each.data for each in tasks[:count])]
        if kept[0] is base and not strategy.merge.with_base:
            kept, known = kept[1:], known[1:]
        merged = _merged(protocol, strategy.merge, base, kept, known, seed)
        yield merged


def _is_among(name: str, tasks: Sequence[Learnt]) -> bool:
    return name in [task.name for task in tasks]


def _settings(protocol: Protocol, strategy: Strategy, seed: int) -> dict[str, Any]:
    """The settings of a strategy's fine-tunings, but for their data.

    Of those that all share, LoRA's go with `method: lora` alone, and `out_dtype` with all others.
    """
    shared, own = fine_tuning_values(protocol), fine_tuning_values(strategy)
    method = {**shared, **own}.get("method", "full")
    lora = shared.pop("lora", {})
    if method == "lora":
        shared.pop("out_dtype", None)
        own["lora"] = LoraSpec(**{**lora, **own.get("lora", {})})
    settings = {**shared, **own, "seed": seed}
    if method == "ewc" and (strategy.merge or strategy.joint):
        raise InputError("method ewc is for chains of fine-tunings: remove merge or joint")
    if method == "ewc" and "ewc_strength" not in settings:
        raise InputError("method ewc needs finetune.ewc_strength")
    return settings


def _fine_tuned(
    start: Model, task: Learnt, settings: dict[str, Any], earlier: Sequence[Model]
) -> Tuned:
    """`start` fine-tuned on a task; under EWC with what the models of earlier tasks anchor."""
    anchors: Sequence[Model] = ()
    if settings.get("method") == "ewc":
        anchors = earlier[-1:] if "ewc_decay" in settings else earlier
        settings = settings | {"save_fisher": True}
        if anchors:
            settings |= {"ewc_fisher": tuple(anchor.name for anchor in anchors)}
        else:
            unknown = {"method", "ewc_strength", "ewc_decay"}
            settings = {key: value for key, value in settings.items() if key not in unknown}
    made = Settings(data=task.data, **settings)
    return Tuned(start, (task.data,), made, tuple(anchors), label=task.name)


def _merged(
    protocol: Protocol,
    merge: Merge,
    base: Given,
    models: Sequence[Model],
    known: Sequence[str | None],
    seed: int,
) -> Model:
    """The models merged; one alone, where the method needs several, is what it is."""
    if merge.merge_method not in METHODS:
        known_methods = ", ".join(METHODS)
        raise InputError(f"no merge_method {merge.merge_method!r}: choose from {known_methods}")
    method = METHODS[merge.merge_method]
    if len(models) < method.min_models:
        return models[-1]
    recipe = merge.model_dump(exclude_none=True, exclude={"with_base", "samples"})
    samples = {"seed": seed, **protocol.samples, **merge.samples}
    data: Sequence[str | None] = [None] * len(models)
    if method.samples != "none":
        if samples.get("source", "data") == "data":
            if method.samples == "each":
                data = known
            samples.setdefault("data", known[-1])
        recipe["samples"] = samples
    text = json.dumps(filled(recipe, seed), sort_keys=True)
    return Merged(
        tuple(models),
        tuple(data),
        base if method.needs_base else None,
        text,
        label=merge.merge_method,
    )
