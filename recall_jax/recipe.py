"""The recipe: mergekit's YAML, and what RECALL adds to it, read strictly."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    Strict,
    ValidationError,
    model_validator,
)

from recall_jax.errors import InputError
from recall_jax.merging.methods import (
    METHODS,
    FilteredValue,
    Method,
    Parameters,
    ParameterValue,
    RecallParameters,
)

_Schema = TypeVar("_Schema", bound=BaseModel)
Count = Annotated[int, Strict(), Field(ge=1)]
# Keys of mergekit's recipes that mean something here only once it is built.
_LATER = {"slices", "modules", "base_model", "tokenizer", "tokenizer_source", "chat_template"}
DtypeName = Literal["bfloat16", "float16", "float32", "float64"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelEntry(_Strict):
    """One model: a folder, `base+adapter`, or a hub id; and its own parameters."""

    model: Annotated[str, Field(min_length=1)]
    parameters: SerializeAsAny[Parameters] = Parameters()


class Samples(_Strict):
    """Where the typical samples come from: chosen from `data`, or given as `typical`."""

    data: str | None = None
    typical: str | None = None
    field: str | None = None
    count: Count = 20
    pool: Count = 1024
    max_tokens: Count = 512
    batch_size: Count = 8
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**32)] = 0
    unit: Annotated[int, Strict()] | str = "last"

    @model_validator(mode="after")
    def _one_source(self) -> "Samples":
        if (self.data is None) == (self.typical is None):
            raise ValueError("give either data (rows to choose from) or typical (rows as given)")
        return self


class Recipe(_Strict):
    """A whole merge.

    `weights` is a file of weights per unit to use in place of comparing the models; `compute_dtype`
    is the forward's, and `ignore_config` lets config attributes pass that are not known.
    """

    merge_method: str
    models: tuple[ModelEntry, ...]
    parameters: SerializeAsAny[Parameters] = Parameters()
    samples: Samples | None = None
    weights: str | None = None
    dtype: DtypeName | None = None
    out_dtype: DtypeName | None = None
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    ignore_config: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _parameters_of_method(cls, values: Any) -> Any:
        """Read `parameters` with the schema of the method that the recipe names."""
        if not isinstance(values, dict):
            return values
        name = values.get("merge_method")
        if not isinstance(name, str) or name not in METHODS:
            known = ", ".join(METHODS)
            raise ValueError(f"unknown merge_method {name!r}: choose from {known}")
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
        return values | {
            "parameters": parameters,
            "models": [_with_parameters(method, index, e) for index, e in enumerate(models)],
        }

    @model_validator(mode="after")
    def _complete(self) -> "Recipe":
        method = METHODS[self.merge_method]
        if len(self.models) < method.min_models:
            raise ValueError(
                f"{self.merge_method} takes at least {method.min_models} models, "
                f"this recipe has {len(self.models)}"
            )
        if method.compares_models and self.weights is None and self.samples is None:
            raise ValueError(
                f"{self.merge_method} compares models on samples: add samples: {{data: FILE}}"
            )
        if not method.compares_models:
            for key in ("samples", "weights", "compute_dtype"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{self.merge_method} compares no models: remove {key}")
        return self

    def changed(self, **changes: Any) -> "Recipe":
        """The recipe with keys set anew, or InputError; a key set to None is left as it is."""
        news = {key: value for key, value in changes.items() if value is not None}
        return make_recipe(self.model_dump(exclude_none=True) | news)

    def to_yaml(self) -> str:
        """The recipe with every default written out, as `read_recipe` takes it."""
        values = self.model_dump(mode="json", exclude_none=True)
        for holder in (values, *values["models"]):
            if not holder["parameters"]:
                del holder["parameters"]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)

_FIELDS = {
    name for schema in (Recipe, ModelEntry, Samples, FilteredValue) for name in schema.model_fields
} | {
    name
    for method in METHODS.values()
    for schema in (method.parameters, method.model_parameters)
    for name in schema.model_fields
}


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file, or InputError naming the file, the key and the fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the recipe {path}: {_reason(error)}") from error
    try:
        documents = [each for each in yaml.load_all(text, _Loader) if each is not None]
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise InputError(f"{path} must hold one mapping with merge_method and models")
    return make_recipe(documents[0], where=str(path))


def make_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """The recipe that a mapping describes, or InputError saying where it is wrong."""
    return _make(Recipe, values, where)


def make_samples(values: dict[str, Any]) -> Samples:
    """A recipe's `samples` on their own, or InputError."""
    return _make(Samples, values, "samples")


def make_recall_parameters(values: dict[str, Any]) -> RecallParameters:
    """A recall recipe's `parameters` on their own, or InputError."""
    return _make(RecallParameters, values, "parameters")


def _make(schema: type[_Schema], values: dict[str, Any], where: str) -> _Schema:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}: {_first_fault(error, schema)}") from None


def parameter_at(value: ParameterValue, tensor: str, depth: float) -> float | None:
    """A parameter's value for one tensor, as mergekit reads it; None where no filter matches.

    A list of numbers is a gradient over the layers, interpolated at `depth` in [0, 1]: layer i of L
    is at i / (L - 1), the embedding at 0, the head at 1 (mergekit gives both the first value).
    """
    if isinstance(value, list):
        if value and isinstance(value[0], FilteredValue):
            for entry in value:
                assert isinstance(entry, FilteredValue)
                if entry.filter in (None, "*") or entry.filter in tensor:
                    return parameter_at(entry.value, tensor, depth)
            return None
        points = np.linspace(0.0, 1.0, len(value))
        return float(np.interp(depth, points, np.asarray(value, np.float64)))
    return float(value)


def _with_parameters(method: Method, index: int, entry: dict[str, Any]) -> dict[str, Any]:
    where = f"models.{index}.parameters"
    return entry | {"parameters": _parse(method.model_parameters, entry.get("parameters"), where)}


def _parse(schema: type[Parameters], values: Any, where: str) -> Parameters:
    if isinstance(values, Parameters):
        return values
    try:
        return schema.model_validate({} if values is None else values)
    except ValidationError as error:
        raise ValueError(_first_fault(error, schema, where)) from None


def _first_fault(error: ValidationError, schema: type[BaseModel], where: str = "") -> str:
    """The first fault of a validation in one line; all that a union says of it together."""
    faults = error.errors()
    fault = faults[0]
    place = _place(fault)
    path = ".".join([where, *place] if where else place)
    if fault["type"] == "extra_forbidden":
        known = _keys_at(schema, place[:-1])
        near = get_close_matches(place[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known) or 'none'}"
        return f"unknown key {path}; {hint}"
    if fault["type"] == "value_error":
        return ": ".join(filter(None, [path, str(fault["ctx"]["error"])]))
    if fault["type"] == "missing":
        return f"{path} is missing"
    said = dict.fromkeys(_wanted(each) for each in faults if _place(each) == place)
    return f"{path or 'every key'} should be {' or '.join(said)}, not {fault['input']!r}"


# pydantic's words for these speak of Python.
_WANTED = {
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "invalid_key": "a word",
    "string_type": "text",
    "string_too_short": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_short": "a list with entries",
}


def _wanted(fault: Any) -> str:
    """What a fault asks for in place of what was given."""
    return _WANTED.get(fault["type"]) or fault["msg"].removeprefix("Input should be ")


def _place(fault: Any) -> list[str]:
    """The keys and indices that lead to a fault, without pydantic's names of union branches."""
    *steps, last = [str(step) for step in fault["loc"]] or [""]
    keys = [step for step in steps if step.isdigit() or step in _FIELDS]
    return [*keys, last] if last in _FIELDS or fault["type"] == "extra_forbidden" else keys


def _keys_at(schema: Any, steps: Sequence[str]) -> list[str]:
    """The keys known at a place of the schema."""
    for step in steps:
        if not step.isdigit() and step in getattr(schema, "model_fields", {}):
            schema = schema.model_fields[step].annotation
        while not isinstance(schema, type) or not issubclass(schema, BaseModel):
            inner = [part for part in get_args(schema) if part not in (type(None), Ellipsis)]
            if not inner:
                return []
            schema = inner[0]
    return list(getattr(schema, "model_fields", {}))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
