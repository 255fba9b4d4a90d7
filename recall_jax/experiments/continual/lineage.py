"""Models before they exist: how each is made from others, and a name that says it in short.

Two models that would be made in the same way have the same name, so that they are made once.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from recall_jax.training.settings import TrainingSettings


@dataclass(frozen=True)
class Given:
    """A model that is there: a folder, a hub id, either with adapters."""

    name: str


@dataclass(frozen=True)
class Tuned:
    """`start` fine-tuned on the rows of all files of `data`, in place of that of `settings`.

    `anchors` are the models whose Fisher information, saved with them, is to be kept.
    """

    start: "Model"
    data: tuple[str, ...]
    settings: TrainingSettings
    anchors: tuple["Model", ...] = ()
    label: str = "tuned"

    @cached_property
    def name(self) -> str:
        """The label, and a digest of all that the model depends on."""
        return _name(self)


@dataclass(frozen=True)
class MergedModel:
    """Models merged: `recipe` is a merge recipe without models, as JSON text.

    `data` has for each model the rows that it knows, None where the method asks for none or where
    the model brings its own. `base` is the recipe's `base_model`.
    """

    models: tuple["Model", ...]
    data: tuple[str | None, ...]
    base: "Model | None"
    recipe: str
    label: str = "merged"

    @cached_property
    def name(self) -> str:
        """The label, and a digest of all that the model depends on."""
        return _name(self)

    def values(self, spec: Callable[["Model"], str]) -> dict[str, Any]:
        """The merge recipe; `spec` says where a model is."""
        entries = [
            {"model": spec(model)} | ({} if data is None else {"data": data})
            for model, data in zip(self.models, self.data, strict=True)
        ]
        base = {} if self.base is None else {"base_model": spec(self.base)}
        return json.loads(self.recipe) | base | {"models": entries}


Model = Given | Tuned | MergedModel


def makers(model: Model) -> tuple[Model, ...]:
    """The models that one is made from."""
    match model:
        case Tuned():
            return (model.start, *model.anchors)
        case MergedModel():
            return model.models if model.base is None else (*model.models, model.base)
    return ()


def parts(model: Model) -> tuple[Model, ...]:
    """The models whose folders are read as one: an adapter's are its start's, and its own."""
    if isinstance(model, Tuned) and model.settings.lora is not None:
        return (*parts(model.start), model)
    return (model,)


def needed(models: Iterable[Model], exists: Callable[[Model], bool]) -> dict[str, Model]:
    """What must be there, by name, to load or make these models, of what exists already."""
    found: dict[str, Model] = {}
    seen: set[str] = set()
    pending = list(models)
    while pending:
        model = pending.pop()
        if model.name in seen:
            continue
        seen.add(model.name)
        if exists(model):
            found[model.name] = model
            pending += parts(model)[:-1]
        else:
            pending += makers(model)
    return found


def ancestry(models: Iterable[Model]) -> dict[str, Model]:
    """These models and all that they are made from, by name, each after its makers."""
    found: dict[str, Model] = {}

    def visit(model: Model) -> None:
        if model.name not in found:
            for maker in makers(model):
                visit(maker)
            found[model.name] = model

    for model in models:
        visit(model)
    return found


def definition(model: Model) -> dict[str, Any]:
    """How a model is made, as JSON values; models by name."""
    match model:
        case Given(name):
            return {"model": name}
        case Tuned():
            settings = {k: v for k, v in asdict(model.settings).items() if v is not None}
            return {
                "start": model.start.name,
                "data": list(model.data),
                "anchors": [anchor.name for anchor in model.anchors],
                "settings": {k: v for k, v in settings.items() if k not in ("data", "ewc_fisher")},
            }
        case MergedModel():
            return model.values(lambda part: part.name)


def _name(model: "Tuned | MergedModel") -> str:
    content = json.dumps(definition(model), sort_keys=True)
    return f"{model.label}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
