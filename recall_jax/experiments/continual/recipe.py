"""Define the recipe of a continual-learning run: tasks, orders, seeds and strategies."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_type_hints

from pydantic import Field, Strict, create_model, field_validator, model_validator

from recall_jax.errors import shown
from recall_jax.evaluation.task import Name, Text
from recall_jax.experiments.continual.presets import PRESETS
from recall_jax.files.schema import Schema, read_yaml
from recall_jax.models.lora import LoraSpec
from recall_jax.training.settings import TrainingSettings

Count = Annotated[int, Strict(), Field(ge=1)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**32)]
Values = dict[str, Any]
# Settings that the protocol determines for each fine-tuning.
_DETERMINED = {"data", "seed", "validation", "ewc_fisher", "ewc_data", "save_fisher"}


def _schema_of(settings: type, **known: Any) -> type[Schema]:
    """Return a schema with the settings of a dataclass, all of them optional."""
    hints = get_type_hints(settings) | known
    optional: dict[str, Any] = {
        field.name: (hints[field.name] | None, None)
        for field in fields(settings)
        if field.name not in _DETERMINED
    }
    return create_model(settings.__name__, __base__=Schema, **optional)


Lora = _schema_of(LoraSpec)
FineTuning = _schema_of(TrainingSettings, lora=Lora)


class SeenTask(Schema):
    """Describe a task to learn: rows to train on, and the evaluation task that measures it."""

    name: Name
    data: Text
    task: Text


class Evaluated(Schema):
    """Set options of `recall evaluate`, and the tasks after which models are evaluated."""

    limit: Count | None = None
    seed: Seed = 0
    batch_size: Count = 8
    data_root: Text | None = None
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    stages: Literal["all", "last"] = "all"


class MergeSettings(Schema):
    """Set keys of a merge recipe; `with_base` adds the base as the first model."""

    merge_method: Text
    parameters: Values = Field(default_factory=dict)
    samples: Values = Field(default_factory=dict)
    with_base: bool = False
    out_dtype: Text | None = None
    compute_dtype: Literal["float32", "bfloat16"] | None = None


class Strategy(Schema):
    """Describe a way to learn the tasks in sequence.

    Without `merge`, each model is fine-tuned from the previous one. With it, each task's expert is
    fine-tuned `from` the base, the last merged model or the last expert, and merged with what the
    strategy `keeps`: earlier experts, or the last merged model. `joint` is a single fine-tuning on
    the rows of all tasks.
    """

    about: str = ""
    finetune: FineTuning = FineTuning()  # type: ignore[valid-type]
    start: Literal["base", "merged", "expert"] = Field(default="base", alias="from")
    merge: MergeSettings | None = None
    keeps: Literal["experts", "merged"] = "experts"
    joint: bool = False

    @model_validator(mode="before")
    @classmethod
    def _like(cls, values: Any) -> Any:
        """Start from the preset that `like` names."""
        if not isinstance(values, dict) or "like" not in values:
            return values
        return _overlaid(_preset(values["like"]), {k: v for k, v in values.items() if k != "like"})

    @model_validator(mode="after")
    def _one_kind(self) -> "Strategy":
        if self.merge is None and self.model_fields_set & {"start", "keeps"}:
            raise ValueError("from and keeps go with merge: add it, or remove them")
        if self.joint and self.merge is not None:
            raise ValueError("joint trains once on all tasks: remove merge")
        return self


class Protocol(Schema):
    """Describe the runs of `recall continual`; `{seed}` in a path or value is replaced by the seed.

    Attributes of the configs in `ignore_config` may be unknown.
    """

    base_model: Text
    tasks: Annotated[tuple[SeenTask, ...], Field(min_length=1)]
    unseen: tuple[Text, ...] = ()
    orders: Annotated[tuple[tuple[Text, ...], ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    finetune: FineTuning = FineTuning()  # type: ignore[valid-type]
    evaluate: Evaluated = Evaluated()
    samples: Values = Field(default_factory=dict)
    ignore_config: tuple[str, ...] = ()
    strategies: Annotated[dict[Name, Strategy], Field(min_length=1)]
    keep: Literal["last", "all", "none"] = "last"

    @model_validator(mode="before")
    @classmethod
    def _given_order(cls, values: Any) -> Any:
        """Use the order in which the tasks are listed if there are no orders."""
        if not isinstance(values, dict) or values.get("orders") is not None:
            return values
        tasks = values.get("tasks")
        if not isinstance(tasks, list | tuple):
            return values
        names = [task.get("name") for task in tasks if isinstance(task, dict)]
        return values | {"orders": [names]}

    @field_validator("strategies", mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """Accept a list of names of presets, and of mappings from a name to a strategy."""
        if not isinstance(values, list):
            return values
        found: dict[str, Any] = {}
        for entry in values:
            news = {entry: _preset(entry)} if isinstance(entry, str) else entry
            if not isinstance(news, dict) or not news:
                raise ValueError(f"{shown(entry)} is neither a preset's name nor NAME: {{…}}")
            if twice := found.keys() & news.keys():
                raise ValueError(f"two strategies are called {min(twice)}")
            found |= news
        return found

    @model_validator(mode="after")
    def _known(self) -> "Protocol":
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tasks are called {name}: give one of them another name")
        for index, order in enumerate(self.orders):
            if not order or len(set(order)) < len(order):
                raise ValueError(f"orders.{index} must name tasks, each of them once")
            if unknown := [name for name in order if name not in names]:
                known = ", ".join(names)
                raise ValueError(f"orders.{index}: no task {shown(unknown[0])} among {known}")
            if order in self.orders[:index]:
                raise ValueError(f"orders.{index} is given twice: remove it")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must be distinct")
        return self


def read_protocol(path: Path) -> Protocol:
    """Read a recipe from a YAML file; InputError names the file, the key and the fault."""
    return read_yaml(Protocol, path)


def fine_tuning_values(part: "Protocol | Strategy") -> dict[str, Any]:
    """Return the settings of fine-tunings that a part of the recipe sets."""
    return cast(Schema, part.finetune).model_dump(exclude_unset=True, exclude_none=True)


def filled(value: Any, seed: int) -> Any:
    """Replace `{seed}` in all texts of a JSON value; a text that is only that becomes a number."""
    if isinstance(value, str):
        return seed if value == "{seed}" else value.replace("{seed}", str(seed))
    if isinstance(value, Mapping):
        return {key: filled(each, seed) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [filled(each, seed) for each in value]
    return value


def _preset(name: Any) -> dict[str, Any]:
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(
            f"no strategy {shown(name)}: choose from {', '.join(PRESETS)}, or describe it"
        )
    return dict(PRESETS[name])


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; values of `above` take precedence."""
    both = {
        key: _overlaid(below[key], above[key])
        for key in below.keys() & above.keys()
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping)
    }
    return {**below, **above, **both}
