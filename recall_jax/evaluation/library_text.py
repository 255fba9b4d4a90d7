"""Split the text of Python's standard library, which needs no download, into passages by domain.

One document in eight is held out, chosen by the checksum of its name; a passage that occurs in
several documents is never in both splits. The documents differ between versions of Python, so
`provenance` records their checksums.
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
"""Lengths of a passage in bytes of UTF-8."""
_HELD_OUT_IN = 8
_BLOCK = 256  # number of code points in a document of the domain `names`
_LAST_NAMED = 0x20000  # ideographs follow, whose names are their numbers
_NO_TEXT = ("encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests")

Documents = Iterator[tuple[str, str]]
"""Pairs of a name and a text."""


class Passage(TypedDict):
    """Hold consecutive lines of a document as a row, and the document's name."""

    text: str
    document: str


def source() -> Documents:
    """Yield the modules of the standard library, without docstrings and blank lines."""
    for name, text, documented in _modules():
        lines = text.split("\n")
        for docstring in documented:
            first, last = docstring.lineno - 1, docstring.end_lineno or docstring.lineno
            lines[first:last] = [""] * (last - first)
        yield name, "\n".join(line for line in lines if line.strip())


def docstrings() -> Documents:
    """Yield the concatenated docstrings of each module."""
    for name, _, documented in _modules():
        yield name, "\n\n".join(inspect.cleandoc(str(docstring.value)) for docstring in documented)


def topics() -> Documents:
    """Yield the topics of the language reference that `help()` displays."""
    from pydoc_data.topics import topics as texts

    yield from sorted(texts.items())


def names() -> Documents:
    """Yield the names of Unicode characters, one a line, except those that contain a number."""
    for start in range(0, _LAST_NAMED, _BLOCK):
        block = [
            (point, unicodedata.name(chr(point), "")) for point in range(start, start + _BLOCK)
        ]
        kept = [name for point, name in block if name and not name.endswith(f"-{point:X}")]
        yield f"U+{start:04X}", "\n".join(kept)


def encodings() -> Documents:
    """Yield the modules of character encodings, most of which are tables."""
    yield from _files(_library() / "encodings")


DOMAINS: Mapping[str, Callable[[], Documents]] = {
    domain.__name__: domain for domain in (source, docstrings, topics, names, encodings)
}


def draw_passages(domain: str, count: int, seed: int, *, held_out: bool = False) -> list[Passage]:
    """Draw `count` passages of a split without replacement; InputError if there are fewer."""
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
    """Return whether a document is held out from training."""
    return zlib.crc32(name.encode()) % _HELD_OUT_IN == 0


def provenance(domains: Sequence[str]) -> dict[str, Any]:
    """Return what text these domains have here: versions, and a SHA-256 for each document."""
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
    """Return the distinct passages of a split, in the order of the documents."""
    found: dict[str, Passage] = {}
    for name, text in _documents(domain):
        if is_held_out_document(name) == held_out:
            for passage in split_passages(text):
                found.setdefault(passage, {"text": passage, "document": name})
    if held_out:
        trained = {passage["text"] for passage in _passages(domain, False)}
        found = {text: passage for text, passage in found.items() if text not in trained}
    return tuple(found.values())


def split_passages(text: str) -> Iterator[str]:
    """Split a text into passages of as many lines as fit; a remainder that is too short is dropped.

    A line too long for a passage is split too.
    """
    passage = b""
    for line in text.encode("utf-8", "replace").splitlines(keepends=True):
        for start in range(0, len(line), PASSAGE_BYTES[-1]):
            piece = line[start : start + PASSAGE_BYTES[-1]]
            if len(passage) + len(piece) > PASSAGE_BYTES[-1]:
                yield from _trimmed(passage)
                passage = b""
            passage += piece
    yield from _trimmed(passage)


def _trimmed(passage: bytes) -> Iterator[str]:
    """Yield the passage without blank lines and partial characters at its ends, if long enough."""
    text = passage.decode("utf-8", "ignore").strip("\n")
    if len(text.encode()) in PASSAGE_BYTES:
        yield text


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@cache
def _modules() -> list[tuple[str, str, list[ast.Constant]]]:
    """Return the name, text and docstrings of every module of the library, except tests."""
    kept = sorted(sys.stdlib_module_names - set(_NO_TEXT))
    paths = [path for name in kept for path in (_library() / f"{name}.py", _library() / name)]
    found = [document for path in paths for document in _files(path)]
    return [(name, text, _docstrings(text)) for name, text in found]


def _files(path: Path) -> Documents:
    """Yield the Python files at or below a path, by their paths in the library."""
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        name = file.relative_to(_library())
        if file.is_file() and not set(name.parts[1:]) & set(_NO_TEXT):
            yield name.as_posix(), file.read_text(encoding="utf-8", errors="replace")


def _docstrings(text: str) -> list[ast.Constant]:
    """Return the docstrings of a module and of its classes and functions, in order."""
    with warnings.catch_warnings(action="ignore"):  # of invalid escapes in the library
        module = ast.parse(text)
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str()) as docstring), *_]:
                    found.append(docstring)
    return sorted(found, key=lambda docstring: docstring.lineno)
