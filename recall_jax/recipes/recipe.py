"""Define and read recipes: mergekit's YAML and RECALL's additions to it, checked strictly."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    SerializeAsAny,
    Strict,
    ValidationError,
    model_validator,
)

from recall_jax.engine.needs import Needs, Observation, Offer
from recall_jax.errors import shown
from recall_jax.files.schema import Schema, first_fault, read_yaml, validate
from recall_jax.inputs.settings import UNNAMED, Samples
from recall_jax.methods.method import Method
from recall_jax.methods.parameters import Parameters, is_gradient
from recall_jax.methods.recall import RecallParameters
from recall_jax.methods.registry import METHODS
from recall_jax.recipes.tree_patterns import TreePatterns

# Keys of mergekit's recipes that are not supported yet.
_LATER = {"slices", "modules", "tokenizer", "tokenizer_source", "chat_template"}
DtypeName = Literal["bfloat16", "float16", "float32", "float64"]
ON_TREES = Offer(observes=(Observation.POOLED,), samples=("none", "newest"), passes=1)
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


class ModelEntry(Schema):
    """Hold a recipe's model (a folder, `base+adapter`, or a hub id), its parameters and data.

    `data` is a file of rows from the task that the model was tuned for.
    """

    model: Annotated[str, Field(min_length=1)]
    data: str | None = None
    parameters: SerializeAsAny[Parameters] = Parameters()


class Recipe(Schema):
    """Hold a complete merge.

    `base_data` is a file of rows for the base. `weights` is a file of weights per unit, used
    instead of comparing the models; `compute_dtype` is the dtype of the forward, and
    `ignore_config` lists unknown config attributes to accept. `tree` is for models that are JAX
    trees, which `forward`, `module:function`, runs.
    """

    merge_method: str
    models: tuple[ModelEntry, ...]
    base_model: Annotated[str, Field(min_length=1)] | None = None
    base_data: str | None = None
    parameters: SerializeAsAny[Parameters] = Parameters()
    samples: Samples | None = None
    weights: str | None = None
    dtype: DtypeName | None = None
    out_dtype: DtypeName | None = None
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    ignore_config: tuple[str, ...] = ()
    ignore_tokenizers: Annotated[bool, Strict()] = False
    tree: TreePatterns | None = None
    forward: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _parameters_of_method(cls, values: Any) -> Any:
        """Read `parameters` with the schema of the method that the recipe names."""
        if not isinstance(values, dict):
            return values
        name = values.get("merge_method")
        if not isinstance(name, str) or name not in METHODS:
            known = ", ".join(METHODS)
            raise ValueError(f"unknown merge_method {shown(name)}: choose from {known}")
        method = METHODS[name]
        if later := sorted(_LATER & values.keys()):
            raise ValueError(f"{later[0]} is mergekit's, and not supported here yet: remove it")
        models = values.get("models")
        if not isinstance(models, list | tuple) or not models:
            raise ValueError("models must be a list such as [{model: FOLDER}, {model: FOLDER}]")
        for index, entry in enumerate(models):
            if not isinstance(entry, dict):
                raise ValueError(f"models.{index} must be a mapping such as {{model: FOLDER}}")
        parameters = _parse(method.parameters, values.get("parameters"), "parameters")
        entries = [_with_parameters(method, index, e) for index, e in enumerate(models)]
        if method.needs.base:  # mergekit's recipes list it among the models too
            entries = [e for e in entries if e.get("model") != values.get("base_model")]
        return values | {"parameters": parameters, "models": entries}

    @model_validator(mode="after")
    def _complete(self) -> "Recipe":
        method = METHODS[self.merge_method]
        needs = method.needs
        if len(self.models) < needs.models:
            besides = " besides the base" if needs.base else ""
            raise ValueError(
                f"{self.merge_method} takes at least {needs.models} models{besides}, "
                f"this recipe has {len(self.models)}"
            )
        if needs.base != (self.base_model is not None):
            raise ValueError(
                f"{self.merge_method} merges relative to a base: add base_model: FOLDER"
                if needs.base
                else f"{self.merge_method} takes no base_model: remove it"
            )
        self._check_samples(method)
        self._check_tree(method)
        method.check(self.parameters, [entry.model for entry in self.models])
        return self

    def _check_samples(self, method: Method[Any, Any]) -> None:
        needs = method.needs
        if self.needs.samples == "newest":
            if self.samples is None:
                raise ValueError(
                    f"{self.merge_method} compares models on samples: add samples: {{data: FILE}}"
                )
            if not self.samples.are_named:
                raise ValueError(UNNAMED)
        if needs.samples == "none":
            for key in ("samples", "compute_dtype"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{self.merge_method} compares no models: remove {key}")
        if self.weights is not None and not method.takes_weights:
            raise ValueError(f"{self.merge_method} takes no file of weights: remove weights")
        if self.base_data is not None and not (needs.base and needs.samples == "each"):
            raise ValueError(
                f"{self.merge_method} does not look at samples of a base: remove base_data"
            )
        if self.samples is not None and self.samples.source != "data":
            named = {f"models.{i}.data": entry.data for i, entry in enumerate(self.models)}
            for key, path in {**named, "base_data": self.base_data}.items():
                if path is not None:
                    raise ValueError(
                        f"samples.source {self.samples.source} needs no {key}: remove it"
                    )
        if needs.labelled and self.samples is not None and self.samples.source != "data":
            raise ValueError(
                f"samples.source {self.samples.source}: {self.merge_method} weighs by labelled "
                "examples: give data or typical"
            )
        if needs.samples != "each":
            for index, entry in enumerate(self.models):
                if entry.data is not None:
                    raise ValueError(
                        f"models.{index}.data: {self.merge_method} does not look at samples of "
                        "each model: remove it"
                    )

    def _check_tree(self, method: Method[Any, Any]) -> None:
        if self.tree is None:
            tokenizer = self.samples and self.samples.tokenizer
            for key, value in {"forward": self.forward, "samples.tokenizer": tokenizer}.items():
                if value is not None:
                    raise ValueError(f"{key} is for JAX trees: add tree, or remove it")
            return
        if not ON_TREES.meets(method.needs):
            raise ValueError(
                f"{self.merge_method} runs models of known families only: JAX trees merge by "
                f"{', '.join(name for name, m in METHODS.items() if ON_TREES.meets(m.needs))}"
            )
        for key in ("compute_dtype", "ignore_config"):
            if getattr(self, key):
                raise ValueError(f"{key} is not for JAX trees: remove it")
        if self.forward is None and self.needs.observes:
            raise ValueError(f"{self.merge_method} runs the models: add forward: MODULE:FUNCTION")
        if self.forward is not None:
            if not method.needs.observes:
                raise ValueError(f"{self.merge_method} runs no model: remove forward")
            if not _FUNCTION.fullmatch(self.forward):
                raise ValueError(f"forward {shown(self.forward)}: write it as MODULE:FUNCTION")
        if self.samples is not None and self.samples.source != "data":
            raise ValueError("samples.source is not for JAX trees: give samples.data")

    @property
    def needs(self) -> Needs:
        """Return what merging needs; with a weights file, neither samples nor a forward."""
        needs = METHODS[self.merge_method].needs
        if self.weights is None:
            return needs
        return replace(needs, samples="none", labelled=False, observes=frozenset())

    @property
    def by_layer(self) -> str | None:
        """Return the key that gives values by layer, or None if one value is for all layers."""
        if self.weights is not None:
            return "weights"
        if METHODS[self.merge_method].needs.by_unit:
            return f"merge_method {self.merge_method}"
        holders = {"parameters": self.parameters}
        holders |= {f"models.{k}.parameters": m.parameters for k, m in enumerate(self.models)}
        keys = (
            f"the gradient of {where}.{type(holder).model_fields[name].alias or name}"
            for where, holder in holders.items()
            for name, value in holder
            if is_gradient(value)
        )
        return next(keys, None)

    def changed(self, **changes: Any) -> "Recipe":
        """Return the recipe with changed keys; None leaves a key unchanged. Raises InputError."""
        news = {key: value for key, value in changes.items() if value is not None}
        return make_recipe(self.model_dump(exclude_none=True) | news)

    def to_yaml(self) -> str:
        """Return the recipe as YAML, with all defaults written out, as `read_recipe` reads it."""
        values = self.model_dump(mode="json", exclude_none=True)
        for holder in (values, *values["models"]):
            if not holder["parameters"]:
                del holder["parameters"]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a YAML file; raises InputError naming file, key and fault."""
    return read_yaml(Recipe, path)


def make_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Return the recipe that a mapping describes; raises InputError naming key and fault."""
    return validate(Recipe, values, where)


def make_recall_parameters(values: dict[str, Any]) -> RecallParameters:
    """Return the `parameters` of a recall recipe, given alone; raises InputError."""
    return validate(_RecallOptions, {"parameters": values}, "options").parameters


class _RecallOptions(Schema):
    parameters: RecallParameters


def _with_parameters(method: Method[Any, Any], index: int, entry: dict[str, Any]) -> dict[str, Any]:
    where = f"models.{index}.parameters"
    return entry | {"parameters": _parse(method.model_parameters, entry.get("parameters"), where)}


def _parse(schema: type[Parameters], values: Any, where: str) -> Parameters:
    if isinstance(values, Parameters):
        return values
    try:
        return schema.model_validate({} if values is None else values)
    except ValidationError as error:
        raise ValueError(first_fault(error, schema, values, where)) from None
