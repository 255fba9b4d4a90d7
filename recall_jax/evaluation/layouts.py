"""Read data sets from the files that they were published in, as the rows that the hub has."""

import html
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recall_jax.engine.budget import memory_budget, room_for_rows
from recall_jax.errors import InputError, brief, storage_faults
from recall_jax.inputs.data import read_rows
from recall_jax.inputs.row_files import Row

_SEGMENT = re.compile(r"<seg[^>]*>(.*?)</seg>")


def read_layout(path: Path, layout: str) -> list[Row]:
    """Return the rows of one file in a layout of `LAYOUTS`.

    Raises InputError, which names the file, if it cannot be read, is not in that layout, or has no
    rows.
    """
    try:
        rows = LAYOUTS[layout](path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        missing = f"key {brief(error)} is missing" if isinstance(error, KeyError) else brief(error)
        raise InputError(f"{path} is not laid out as {layout} files are: {missing}") from error
    if not rows:
        raise InputError(f"{path} holds no rows")
    return rows


def _rows(path: Path) -> list[Row]:
    """Read any format of `inputs.row_files`."""
    return read_rows(path, memory=room_for_rows(memory_budget(None)))


def _tsv(path: Path) -> list[Row]:
    """Read a file of GLUE: a header, and tabs between fields that are never quoted."""
    header, *lines = [line.split("\t") for line in _split(_text(path))]
    rows = []
    for number, fields in enumerate(lines, start=2):
        if fields == [""]:
            continue
        if len(fields) != len(header):
            raise InputError(
                f"{path}, line {number} has {len(fields)} fields, the header has {len(header)}"
            )
        rows.append(dict(zip(header, fields, strict=True)))
    return rows


def _squad(path: Path) -> list[Row]:
    """Read a file of SQuAD; the `answers` to a question marked `is_impossible` are empty."""
    return [
        {
            "id": question["id"],
            "title": article["title"],
            "context": paragraph["context"],
            "question": question["question"],
            "answers": {
                "text": [answer["text"] for answer in question["answers"]],
                "answer_start": [answer["answer_start"] for answer in question["answers"]],
            },
        }
        for article in _json(_text(path), str(path))["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def _iwslt(path: Path) -> list[Row]:
    """Read an English file, `….en.xml` or `train.tags.….en`, and the French one of its folder."""
    is_xml = path.suffix == ".xml"
    stem = path.name.removesuffix(".xml").removesuffix(".en")
    other = path.with_name(f"{stem}.fr{'.xml' if is_xml else ''}")
    read = _segments if is_xml else _lines
    english, french = read(path), read(other)
    if len(english) != len(french):
        raise InputError(f"{path} has {len(english)} sentences, but {other} has {len(french)}")
    return [{"translation": {"en": e, "fr": f}} for e, f in zip(english, french, strict=True)]


def _segments(path: Path) -> list[str]:
    return [html.unescape(text).strip() for text in _SEGMENT.findall(_text(path))]


def _lines(path: Path) -> list[str]:
    """Return the lines of text, without those that begin with a tag, which describe the talk."""
    lines = (line.strip() for line in _split(_text(path)))
    return [line for line in lines if not line.startswith("<")]


def _race(path: Path) -> list[Row]:
    """Read a file of RACE: an article and its questions."""
    article = _json(_text(path), str(path))
    questions = zip(article["questions"], article["options"], article["answers"], strict=True)
    return [
        {
            "example_id": article["id"],
            "article": article["article"],
            "question": question,
            "options": options,
            "answer": answer,
        }
        for question, options, answer in questions
    ]


def _medmcqa(path: Path) -> list[Row]:
    """Read a file of MedMCQA: lines of JSON, whose `cop` counts from 1, where the hub has 0."""
    rows = []
    for number, line in enumerate(_split(_text(path)), start=1):
        if line.strip():
            row = _json(line, f"{path}, line {number}")
            rows.append({**row, "cop": row["cop"] - 1})
    return rows


def _text(path: Path) -> str:
    with storage_faults(f"read {path}"):
        return path.read_bytes().decode("utf-8-sig")


def _split(text: str) -> list[str]:
    """Split at line feeds only: `str.splitlines` also splits at characters within sentences."""
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {brief(error)}") from error


LAYOUTS: Mapping[str, Callable[[Path], list[Row]]] = {
    "rows": _rows,
    "tsv": _tsv,
    "squad": _squad,
    "iwslt": _iwslt,
    "race": _race,
    "medmcqa": _medmcqa,
}
