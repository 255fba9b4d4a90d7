"""Read JSON objects strictly, with an InputError for every fault, and write them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recall_jax.errors import InputError, brief, reading, shown

MAX_BYTES = 100_000_000  # the tokenizer.json of a large vocabulary has a third of this
_MAX_DEPTH = 100
_MAX_DIGITS = 100


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in `text`; errors name it `where`.

    Raises InputError if the text is not UTF-8, not JSON or not an object, gives a key twice, has an
    integer of over 100 digits, or is nested more than 100 levels deep.
    """
    with reading(where):
        try:
            value = json.loads(
                text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_int=_integer
            )
            if _is_deeper(value, _MAX_DEPTH):
                raise RecursionError
        except ValueError as error:
            raise InputError(f"{where} is not valid JSON: {brief(error)}") from error
        except RecursionError as error:
            said = f"nested more than {_MAX_DEPTH} levels deep"
            raise InputError(f"{where} is not valid JSON: {said}") from error
        if not isinstance(value, dict):
            raise InputError(f"{where} holds {type(value).__name__}, not a JSON object")
        return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; InputError also if the file cannot be read."""
    with reading(str(path)), path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise InputError(f"{path} has over {MAX_BYTES:,} bytes, too many for a JSON object")
    return parse_json_object(text, str(path))


def json_text(
    value: Mapping[str, Any],
    *,
    indent: int = 1,
    ensure_ascii: bool = True,
    allow_nan: bool = False,
) -> str:
    """Return the text of a JSON file for `value`, with numbers unrounded.

    Raises ValueError for NaN and infinite numbers, unless `allow_nan`, as Python's dialect has
    them.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, allow_nan=allow_nan)
    return text + "\n"


def write_json_object(path: Path, value: Mapping[str, Any], **style: Any) -> None:
    """Write an object to the file at `path`; `style` holds keyword arguments of `json_text`."""
    text = json_text(value, **style)
    # Lone surrogates, which UTF-8 lacks, are escaped.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {shown(key)} is given twice")
        result[key] = value
    return result


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _is_deeper(value: Any, limit: int) -> bool:
    """Return whether lists and objects are nested more than `limit` levels deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
