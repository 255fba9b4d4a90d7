"""Find whether the same token ids mean the same tokens to several models.

Only their files are read; files that are equal byte for byte are not parsed.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from filecmp import cmp
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

from recall_jax.checkpoint.companions import has_tokenizer, vocabulary_files
from recall_jax.checkpoint.folder import Checkpoint, older_folders
from recall_jax.errors import InputError, escaped, reading, shown
from recall_jax.files.json_objects import read_json_object

_TOKENIZER_FILE = "tokenizer.json"  # contains everything in the other files
_MERGES = "merges.txt"


@dataclass(frozen=True)
class Vocabulary:
    """Hold the id of each token, and a digest of the rules that split a text into tokens."""

    ids: Mapping[str, int]
    splits: str = ""


@dataclass(frozen=True)
class Difference:
    """Describe how a model's tokenizer differs from the reader's, which tokenises the texts.

    `moved` maps tokens of both to the two ids; `unknown` maps the reader's ids to tokens that the
    model lacks; `more` maps tokens that the reader lacks to the model's ids; all are in the order
    of ids. `splits` says that both have the same tokens but split texts by different rules.
    `unread` is the reason why they could not be compared.
    """

    model: str
    reader: str
    moved: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    unknown: Mapping[int, str] = field(default_factory=dict)
    more: Mapping[str, int] = field(default_factory=dict)
    splits: bool = False
    unread: str | None = None

    def warnings(self) -> list[str]:
        """Return warnings for a merge of the models, or only the most serious one."""
        if self.unread is not None:
            return [
                f"the tokenizers of {self.model} and {self.reader} are different files and were "
                f"not compared: {self.unread}"
            ]
        if self.moved:
            return [f"{self._first_moved()}: embeddings of different tokens are merged"]
        lines = []
        if self.unknown:
            index, token = next(iter(self.unknown.items()))
            described = _first(token, index, len(self.unknown))
            lines.append(f"{self.model} does not know {described} of {self.reader}")
        if self.more:
            token, index = next(iter(self.more.items()))
            described = _first(token, index, len(self.more))
            lines.append(
                f"{self.reader}, whose tokenizer is kept, does not know {described} of {self.model}"
            )
        if self.splits:
            lines.append(
                f"{self.model} and {self.reader} have the same tokens, and split texts into them "
                "by different merges or scores"
            )
        return lines

    def check(self, used: Iterable[int]) -> None:
        """Raise InputError if `used`, token ids of the reader, mean other tokens to the model."""
        cure = (
            "take models with one tokenizer, or pass --ignore-tokenizers (in a recipe, "
            "ignore_tokenizers: true)"
        )
        if self.moved:
            raise InputError(
                f"{self._first_moved()}: the samples would be different texts for "
                f"{self.model}; {cure}"
            )
        if found := sorted(self.unknown.keys() & set(used)):
            described = _first(self.unknown[found[0]], found[0], len(found))
            raise InputError(
                f"the samples hold {described} of {self.reader}, and {self.model} does not know "
                f"them: {cure}"
            )

    def _first_moved(self) -> str:
        token, (its, readers) = next(iter(self.moved.items()))
        return (
            f"the token {shown(token)} has the id {its} in {self.model} and {readers} in "
            f"{self.reader}, the first of {len(self.moved):,} with two ids"
        )


def tokenizer_differences(reader: Checkpoint, models: Sequence[Checkpoint]) -> list[Difference]:
    """Return how the tokenizers of models differ from that of `reader`, one of them.

    Models without a difference are left out. A reader without a tokenizer uses that of the newest
    model that has one.
    """
    folders: dict[str, Sequence[Path]] = {model.name: model.tokenizer_folders for model in models}
    folders[reader.name] = (*reader.tokenizer_folders, *older_folders([*models, reader]))
    return compare_vocabularies(reader.name, folders)


def compare_vocabularies(reader: str, folders: Mapping[str, Sequence[Path]]) -> list[Difference]:
    """Return the `tokenizer_differences` of models or trees by name.

    `folders` maps each name to the folders in which its tokenizer may be. Models without a
    tokenizer are skipped.
    """
    found = {name: next(filter(has_tokenizer, its), None) for name, its in folders.items()}
    mine = found[reader]
    read = cache(_read_vocabulary)
    differences = []
    for name, its in found.items():
        if mine is None or its is None or its == mine:
            continue
        try:
            same, added = _same_bytes(its, mine), (_added_tokens(its), _added_tokens(mine))
            if same and added[0] == added[1]:
                continue
            if same and not _is_readable(mine):
                one, other = map(Vocabulary, added)
            else:
                one, other = read(its), read(mine)
        except InputError as error:
            differences.append(Difference(name, reader, unread=str(error)))
        else:
            differences.append(_compare(name, one, reader, other))
    return [each for each in differences if each.warnings()]


def _compare(model: str, one: Vocabulary, reader: str, other: Vocabulary) -> Difference:
    if one.ids == other.ids:
        return Difference(model, reader, splits=one.splits != other.splits)
    its, readers = (sorted(each.ids.items(), key=itemgetter(1)) for each in (one, other))
    return Difference(
        model,
        reader,
        moved={t: (one.ids[t], i) for t, i in readers if one.ids.get(t, i) != i},
        unknown={i: t for t, i in readers if t not in one.ids},
        more={t: i for t, i in its if t not in other.ids},
    )


def _same_bytes(one: Path, other: Path) -> bool:
    """Return whether the files of two tokenizers are equal, as far as both have them."""
    shared = [name for name in (*vocabulary_files(one), _MERGES) if (other / name).is_file()]
    names = (
        [_TOKENIZER_FILE]
        if _TOKENIZER_FILE in shared
        else [name for name in shared if (one / name).is_file()]
    )
    with reading(f"the tokenizers in {one} and {other}"):
        return bool(names) and all(cmp(one / name, other / name, shallow=False) for name in names)


def _is_readable(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_TOKENIZER_FILE, "vocab.json", "vocab.txt"))


def _read_vocabulary(folder: Path) -> Vocabulary:
    """Read tokenizer.json, or older vocabulary files; InputError for other kinds."""
    if (path := folder / _TOKENIZER_FILE).is_file():
        content = read_json_object(path)
        with reading(str(path)):
            model = content["model"]
            vocabulary = model["vocab"]
            splits: Sequence[Any] = model.get("merges") or ()
            if isinstance(vocabulary, list):  # pairs of a piece and its score
                splits = [str(score) for _, score in vocabulary]
                vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
            added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    elif (path := folder / "vocab.json").is_file():
        vocabulary, added = read_json_object(path), {}
        splits = _lines(folder / _MERGES)
    elif (path := folder / "vocab.txt").is_file():
        vocabulary, added = {token: index for index, token in enumerate(_lines(path))}, {}
        splits = ()
    else:
        names = ", ".join(map(escaped, vocabulary_files(folder)))
        raise InputError(f"recall cannot read the tokens in {names} of {folder}")
    with reading(str(path)):
        ids = {**vocabulary, **added, **_added_tokens(folder)}
        if not all(type(index) is int for index in ids.values()):
            raise ValueError("not all tokens have an integer as their id")
        pairs = (each if isinstance(each, str) else " ".join(each) for each in splits)
        return Vocabulary(ids, hashlib.sha256("\n".join(pairs).encode()).hexdigest())


def _added_tokens(folder: Path) -> dict[str, int]:
    """Return the tokens that transformers adds from the small files next to a vocabulary."""
    found: dict[str, int] = {}
    if (path := folder / "added_tokens.json").is_file():
        found |= read_json_object(path)
    if (path := folder / "tokenizer_config.json").is_file():
        content = read_json_object(path)
        with reading(str(path)):
            decoder = content.get("added_tokens_decoder") or {}
            found |= {token["content"]: int(index) for index, token in decoder.items()}
    return found


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file without the header of merges; empty if it is missing."""
    if not path.is_file():
        return []
    with reading(str(path)):
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return lines[1:] if lines[0].startswith("#version") else lines


def _first(token: str, index: int, count: int) -> str:
    return f"{count:,} token{'s' * (count > 1)}, first {shown(token)} (id {index}),"
