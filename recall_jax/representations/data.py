"""Data files: rows of text in the formats people keep them in."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recall_jax.errors import InputError

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl, .json, .csv, .txt or .parquet file, blank lines not counted.

    A line of .txt is a row with the field `text`; .json holds a list of objects. Raises InputError
    for a missing, unreadable, malformed or empty file, with the line where there is one.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise InputError(f"{path}: cannot read this kind of data file; use one of {known}")
    if not path.is_file():
        raise InputError(f"no data file {path}")
    try:
        rows = reader(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not rows:
        raise InputError(f"{path} holds no rows: give at least one")
    return rows


def row_text(row: Mapping[str, Any], where: str, field: str | None = None) -> str | list[Any]:
    """The text of a row: `field` if given, else `text`, `prompt` + `completion`, or `messages`.

    Prompt and completion are joined as they stand. `messages` are returned as they are, a list for
    the chat template. Raises InputError, which begins with `where`, for a row without any of them
    or with no text there.
    """
    if field is not None:
        return _text_field(row, field, where)
    if "text" in row:
        return _text_field(row, "text", where)
    if "prompt" in row and "completion" in row:
        return _text_field(row, "prompt", where) + _text_field(row, "completion", where)
    if "messages" in row:
        if not isinstance(row["messages"], list):
            raise InputError(f"{where}: messages is no list of messages")
        return row["messages"]
    raise InputError(
        f"{where} has neither text, nor prompt and completion, nor messages (it has "
        f"{', '.join(map(str, row)) or 'no fields'}): name its field with samples.field"
    )


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON lines; values that JSON lacks, such as dates of Parquet, as text."""
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    # Half a surrogate pair, which UTF-8 lacks, becomes the escape that JSON has for it.
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def _text_field(row: Mapping[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise InputError(f"{where} has no field {field!r} (it has {', '.join(map(str, row))})")
    value = row[field]
    if not isinstance(value, str):
        raise InputError(f"{where}: field {field!r} holds {type(value).__name__}, not text")
    return value


def _read_text(path: Path) -> str:
    # Decoded in one piece: the place of a fault is then its place in the file.
    return path.read_bytes().decode("utf-8-sig")


def _read_lines(path: Path) -> Iterable[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    for number, line in enumerate(io.StringIO(_read_text(path), newline=None), start=1):
        if line.strip():
            yield number, line.rstrip("\n")


def _read_txt(path: Path) -> list[Row]:
    return [{"text": line} for _, line in _read_lines(path)]


def _read_jsonl(path: Path) -> list[Row]:
    return [
        _object(_parse(line, f"{path}, line {number}"), f"{path}, line {number}")
        for number, line in _read_lines(path)
    ]


def _read_json(path: Path) -> list[Row]:
    content = _parse(_read_text(path), str(path))
    if not isinstance(content, list):
        raise InputError(f"{path} holds no list: give a list of objects, one for each row")
    return [_object(row, f"{path}, row {index}") for index, row in enumerate(content)]


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        where = f"{path}, line {reader.reader.line_num}"
        raise InputError(f"{where} is not well-formed CSV: {error}") from error
    names = reader.fieldnames or []
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{path} has two columns {twice[0]!r}: rename one")
    for index, row in enumerate(rows):
        if None in row or None in row.values():
            raise InputError(f"{path}, row {index} has not as many fields as the header")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a Parquet file: {' '.join(str(error).split())}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{error.msg} at character {error.pos}"
        raise InputError(f"{where} is not JSON: {place}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise InputError(f"{where} cannot be read as JSON: {error}") from error


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f'{where} is no object: each row is one, such as {{"text": "…"}}')
    return value


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}
