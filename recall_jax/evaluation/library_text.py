"""Text that any machine with Python has: domains of the standard library, cut into passages.

One document in eight is held out, known by the checksum of its name alone; a passage that also
stands in another document is never in both splits. What the documents say differs from one version
of Python to the next, so `provenance` tells what there was.
"""

import ast
import hashlib
import inspect
import platform
import random
import sys
import sysconfig
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

from recall_jax.errors import InputError

PASSAGE_BYTES = range(64, 241)
"""Lengths of a passage, UTF-8."""
_HELD_OUT_IN = 8
_BLOCK = 256  # code points in a document of names
_LAST_NAMED = 0x20000  # beyond are ideographs, which are named by their numbers
_NO_TEXT = ("encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests")

Documents = Iterator[tuple[str, str]]
"""Names and texts."""


class Passage(TypedDict):
    """A row: some lines of a document."""

    text: str
    document: str


def source() -> Documents:
    """Modules of the standard library without their docstrings."""
    for name, text, documented in _modules():
        lines = text.split("\n")
        for docstring in documented:
            first, last = docstring.lineno - 1, docstring.end_lineno or docstring.lineno
            lines[first:last] = [""] * (last - first)
        yield name, "\n".join(line for line in lines if line.strip())


def docstrings() -> Documents:
    """All docstrings of each module, one after the other."""
    for name, _, documented in _modules():
        yield name, "\n\n".join(inspect.cleandoc(str(docstring.value)) for docstring in documented)


def topics() -> Documents:
    """The language reference as `help()` shows it, a document for each topic."""
    from pydoc_data.topics import topics as texts

    yield from sorted(texts.items())


def names() -> Documents:
    """Names of Unicode's characters, a line each; those that only tell a number are left out."""
    for start in range(0, _LAST_NAMED, _BLOCK):
        block = [
            (point, unicodedata.name(chr(point), "")) for point in range(start, start + _BLOCK)
        ]
        kept = [name for point, name in block if name and not name.endswith(f"-{point:X}")]
        yield f"U+{start:04X}", "\n".join(kept)


def encodings() -> Documents:
    """The modules of character encodings, most of them tables."""
    yield from _files(_library() / "encodings")


DOMAINS: Mapping[str, Callable[[], Documents]] = {
    domain.__name__: domain for domain in (source, docstrings, topics, names, encodings)
}


def draw_passages(domain: str, count: int, seed: int, *, held_out: bool = False) -> list[Passage]:
    """`count` passages of a split, drawn without replacement; InputError if there are fewer."""
    if domain not in DOMAINS:
        raise InputError(f"no domain {domain!r} of text: choose from {', '.join(DOMAINS)}")
    found = _passages(domain, held_out)
    if len(found) < count:
        raise InputError(
            f"the library of Python {platform.python_version()} has {len(found)} passages of "
            f"{domain}, not {count}: ask for fewer, or take a Python that has all of its library"
        )
    return random.Random(seed).sample(found, count)


def is_held_out_document(name: str) -> bool:
    """Whether a document is for tests only."""
    return zlib.crc32(name.encode()) % _HELD_OUT_IN == 0


def provenance(domains: Sequence[str]) -> dict[str, Any]:
    """Which text these domains were made of: versions, and a SHA-256 for each document."""
    return {
        "python": platform.python_version(),
        "unicode": unicodedata.unidata_version,
        "documents": {
            domain: {
                name: hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
                for name, text in _documents(domain)
            }
            for domain in domains
        },
    }


@cache
def _documents(domain: str) -> tuple[tuple[str, str], ...]:
    return tuple(DOMAINS[domain]())


@cache
def _passages(domain: str, held_out: bool) -> tuple[Passage, ...]:
    """All passages of a split in their order, no two alike."""
    found: dict[str, Passage] = {}
    for name, text in _documents(domain):
        if is_held_out_document(name) == held_out:
            for passage in cut(text):
                found.setdefault(passage, {"text": passage, "document": name})
    if held_out:
        trained = {passage["text"] for passage in _passages(domain, False)}
        found = {text: passage for text, passage in found.items() if text not in trained}
    return tuple(found.values())


def cut(text: str) -> Iterator[str]:
    """A text in passages of whole lines, as many as fit; too short a rest is left out.

    A line too long for a passage is cut itself.
    """
    passage = b""
    for line in text.encode("utf-8", "replace").splitlines(keepends=True):
        for start in range(0, len(line), PASSAGE_BYTES[-1]):
            piece = line[start : start + PASSAGE_BYTES[-1]]
            if len(passage) + len(piece) > PASSAGE_BYTES[-1]:
                yield from _whole(passage)
                passage = b""
            passage += piece
    yield from _whole(passage)


def _whole(passage: bytes) -> Iterator[str]:
    """The passage, if it is one, without blank lines around it or half a character at its ends."""
    text = passage.decode("utf-8", "ignore").strip("\n")
    if len(text.encode()) in PASSAGE_BYTES:
        yield text


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@cache
def _modules() -> list[tuple[str, str, list[ast.Constant]]]:
    """Every module of the library but tests and what is no code: its name, text and docstrings."""
    kept = sorted(sys.stdlib_module_names - set(_NO_TEXT))
    paths = [path for name in kept for path in (_library() / f"{name}.py", _library() / name)]
    found = [document for path in paths for document in _files(path)]
    return [(name, text, _docstrings(text)) for name, text in found]


def _files(path: Path) -> Documents:
    """The Python files at or below a path, by their names in the library."""
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        name = file.relative_to(_library())
        if file.is_file() and not set(name.parts[1:]) & set(_NO_TEXT):
            yield name.as_posix(), file.read_text(encoding="utf-8", errors="replace")


def _docstrings(text: str) -> list[ast.Constant]:
    """The docstrings of a module and of all that is in it, in their order."""
    with warnings.catch_warnings(action="ignore"):  # of escapes that the library has wrong
        module = ast.parse(text)
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str()) as docstring), *_]:
                    found.append(docstring)
    return sorted(found, key=lambda docstring: docstring.lineno)
