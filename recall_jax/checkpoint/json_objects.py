"""JSON objects that came from outside: parsed strictly, every fault an InputError."""

import json
from pathlib import Path
from typing import Any

from recall_jax.errors import InputError, storage_faults


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """The object that `text` holds; `where` names it in errors.

    Raises InputError if it is not UTF-8, not JSON, not an object, or gives a key twice.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} holds {type(value).__name__}, not a JSON object")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in the file at `path`; InputError as above, or if it cannot be read."""
    with storage_faults(f"read {path}"):
        text = path.read_bytes()
    return parse_json_object(text, str(path))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} is given twice")
        result[key] = value
    return result
