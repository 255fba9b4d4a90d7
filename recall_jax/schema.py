"""YAML files read by a schema: strictly, and every fault one line with the file and the key."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from recall_jax.errors import InputError

_Schema = TypeVar("_Schema", bound=BaseModel)
# pydantic's words for these speak of Python.
_WANTED = {
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "string_type": "text",
    "string_too_short": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_short": "a list with entries",
}


class Strict(BaseModel):
    """A part of a schema: frozen, and without keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(schema: type[_Schema], path: Path) -> _Schema:
    """What a YAML file of one mapping describes; InputError, which begins with the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}") from error
    return parse_yaml(schema, text, str(path))


def parse_yaml(schema: type[_Schema], text: str, where: str) -> _Schema:
    """What a text of YAML describes; `where` names it in errors. Raises InputError."""
    try:
        documents = [each for each in yaml.load_all(text, _Loader) if each is not None]
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise InputError(f"{where} must hold one mapping of {', '.join(schema.model_fields)}")
    try:
        return schema.model_validate(documents[0])
    except ValidationError as error:
        raise InputError(f"{where}: {_first_fault(error, schema, documents[0])}") from None


def _first_fault(error: ValidationError, schema: type[BaseModel], values: Any) -> str:
    """The first fault of a validation in one line; all that a union says of it together."""
    faults = error.errors()
    fault = faults[0]
    place = _place(fault, values)
    if fault["type"] == "extra_forbidden":
        near = get_close_matches(str(fault["loc"][-1]), _fields(schema), n=1)
        return f"unknown key {place}" + (f"; did you mean {near[0]}?" if near else "; remove it")
    if fault["type"] == "value_error":
        return ": ".join(filter(None, [place, str(fault["ctx"]["error"])]))
    if fault["type"] == "missing":
        return f"{place} is missing"
    said = dict.fromkeys(_wanted(each) for each in faults if _place(each, values) == place)
    return f"{place} should be {' or '.join(said)}, not {fault['input']!r}"


def _wanted(fault: Any) -> str:
    return _WANTED.get(fault["type"]) or fault["msg"].removeprefix("Input should be ")


def _place(fault: Any, values: Any) -> str:
    """The keys and indices that lead to a fault, without pydantic's names of union branches."""
    keys: list[Any] = []
    for step in fault["loc"]:
        inside = isinstance(values, Mapping) and step in values
        if inside or (isinstance(values, list) and isinstance(step, int) and step < len(values)):
            keys.append(step)
            values = values[step]
    if fault["type"] == "missing":
        keys.append(fault["loc"][-1])
    return ".".join(map(str, keys))


def _fields(schema: Any) -> list[str]:
    """Every key that a schema or a part of it knows."""

    def parts(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
            for field in annotation.model_fields.values():
                yield from parts(field.annotation)
        for inner in get_args(annotation):
            yield from parts(inner)

    return list(dict.fromkeys(name for part in parts(schema) for name in part.model_fields))
