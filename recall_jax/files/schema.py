"""Read YAML files by a schema, and report every fault in one line with the file and the key."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from recall_jax.errors import InputError, brief, reading, shown
from recall_jax.files.yaml_text import MAX_BYTES, parse_documents

_Model = TypeVar("_Model", bound=BaseModel)
# pydantic describes these in terms of Python's types.
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
    """Declare a part of a file: frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def read_yaml(schema: type[_Model], path: Path) -> _Model:
    """Parse a YAML file that holds one mapping; InputError begins with the path."""
    with reading(str(path)):
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise InputError(f"{path} has over {MAX_BYTES:,} bytes, too many for a file of YAML")
        text = content.decode("utf-8")
    return parse_yaml(schema, text, str(path))


def parse_yaml(schema: type[_Model], text: str, where: str) -> _Model:
    """Parse a YAML text that holds one mapping; InputError begins with `where`."""
    documents = parse_documents(text, where)
    if len(documents) != 1 or not isinstance(documents[0], dict):
        needed = [name for name, field in schema.model_fields.items() if field.is_required()]
        raise InputError(f"{where} must hold one mapping with {' and '.join(needed)}")
    return validate(schema, documents[0], where)


def validate(schema: type[_Model], values: dict[str, Any], where: str) -> _Model:
    """Build `schema` from a mapping; InputError begins with `where`."""
    with reading(where):
        try:
            return schema.model_validate(values)
        except ValidationError as error:
            raise InputError(f"{where}: {first_fault(error, schema, values)}") from None


def first_fault(
    error: ValidationError, schema: type[BaseModel], values: Any, where: str = ""
) -> str:
    """Describe the first fault of `values` in one line, with all alternatives of a union.

    `where` is the dotted path of `values` within the file, such as "models.0.parameters".
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
    """Describe what kind of value is expected."""
    if fault["type"] == "too_short":
        kind = "a mapping" if isinstance(fault["input"], Mapping) else "a list"
        least = fault["ctx"]["min_length"]
        return f"{kind} with {least} entries or more" if least > 1 else f"{kind} with entries"
    return _WANTED.get(fault["type"]) or brief(fault["msg"].removeprefix("Input should be "))


def _place(fault: Any, values: Any) -> list[str]:
    """Return the keys and indices that lead to a fault, without pydantic's union branches."""
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
    """Return the keys known at a place of the schema; those of all alternatives of a union."""
    parts = _models(schema)
    for step in steps:
        fields = [known[step] for known in map(_fields, parts) if step in known]
        if fields:  # else an index, or a key of a mapping of such parts
            parts = [model for field in fields for model in _models(field.annotation)]
    return list(dict.fromkeys(name for part in parts for name in _fields(part)))


def _fields(schema: type[BaseModel]) -> dict[str, FieldInfo]:
    """Map the names of a schema's keys, as in a file, to its fields."""
    return {field.alias or name: field for name, field in schema.model_fields.items()}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the schemas in an annotation, also from within lists and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
