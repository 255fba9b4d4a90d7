"""YAML files read by a schema: strictly, and every fault one line with the file and the key."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from recall_jax.errors import InputError, brief, reading, shown
from recall_jax.files.yaml_text import MAX_BYTES, parse_documents

_Model = TypeVar("_Model", bound=BaseModel)
# pydantic's words for these speak of Python.
_WANTED = {
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "invalid_key": "a word",
    "string_type": "text",
    "string_too_short": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "string_pattern_mismatch": "letters, digits and _ . - after a letter or digit",
}


class Schema(BaseModel):
    """A part of a file: frozen, and without keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def read_yaml(schema: type[_Model], path: Path) -> _Model:
    """What a YAML file of one mapping describes; InputError, which begins with the file."""
    with reading(str(path)):
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise InputError(f"{path} has over {MAX_BYTES:,} bytes, too many for a file of YAML")
        text = content.decode("utf-8")
    return parse_yaml(schema, text, str(path))


def parse_yaml(schema: type[_Model], text: str, where: str) -> _Model:
    """What a text of YAML describes; `where` names it in errors. Raises InputError."""
    documents = parse_documents(text, where)
    if len(documents) != 1 or not isinstance(documents[0], dict):
        needed = [name for name, field in schema.model_fields.items() if field.is_required()]
        raise InputError(f"{where} must hold one mapping with {' and '.join(needed)}")
    return validate(schema, documents[0], where)


def validate(schema: type[_Model], values: dict[str, Any], where: str) -> _Model:
    """What a mapping describes, or InputError, which begins with `where`."""
    with reading(where):
        try:
            return schema.model_validate(values)
        except ValidationError as error:
            raise InputError(f"{where}: {first_fault(error, schema, values)}") from None


def first_fault(
    error: ValidationError, schema: type[BaseModel], values: Any, where: str = ""
) -> str:
    """The first fault of `values` in one line; all that a union says of it together.

    `where` leads to the values inside of a larger file, such as "models.0.parameters".
    """
    faults = error.errors()
    fault = faults[0]
    place = _place(fault, values)
    path = brief(".".join([where, *place] if where else place))
    if fault["type"] == "extra_forbidden":
        known = _keys_at(schema, place[:-1])
        near = get_close_matches(place[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known) or 'none'}"
        return f"unknown key {path}; {hint}"
    if fault["type"] == "value_error":
        return ": ".join(filter(None, [path, str(fault["ctx"]["error"])]))
    if fault["type"] == "missing":
        return f"{path} is missing"
    said = dict.fromkeys(_wanted(each) for each in faults if _place(each, values) == place)
    return f"{path or 'every key'} should be {' or '.join(said)}, not {shown(fault['input'])}"


def _wanted(fault: Any) -> str:
    """What a fault asks for in place of what was given."""
    if fault["type"] == "too_short":
        kind = "a mapping" if isinstance(fault["input"], Mapping) else "a list"
        least = fault["ctx"]["min_length"]
        return f"{kind} with {least} entries or more" if least > 1 else f"{kind} with entries"
    return _WANTED.get(fault["type"]) or brief(fault["msg"].removeprefix("Input should be "))


def _place(fault: Any, values: Any) -> list[str]:
    """The keys and indices that lead to a fault, without pydantic's names of union branches."""
    keys: list[Any] = []
    for step in fault["loc"]:
        inside = isinstance(values, Mapping) and step in values
        if inside or (
            isinstance(values, list | tuple) and isinstance(step, int) and step < len(values)
        ):
            keys.append(step)
            values = values[step]
    if fault["type"] == "missing":
        keys.append(fault["loc"][-1])
    return list(map(str, keys))


def _keys_at(schema: Any, steps: Sequence[str]) -> list[str]:
    """The keys known at a place of the schema; where it is one of several kinds, those of all."""
    parts = _models(schema)
    for step in steps:
        fields = [known[step] for known in map(_fields, parts) if step in known]
        if fields:  # else an index, or a key of a mapping of such parts
            parts = [model for field in fields for model in _models(field.annotation)]
    return list(dict.fromkeys(name for part in parts for name in _fields(part)))


def _fields(schema: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a schema by their names in a file."""
    return {field.alias or name: field for name, field in schema.model_fields.items()}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The schemas in an annotation, whatever lists and unions they are in."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
