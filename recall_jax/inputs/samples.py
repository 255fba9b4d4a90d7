"""Read samples: rows of a data file as token ids, ready for a forward pass."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.errors import InputError
from recall_jax.inputs.data import draw_rows, read_rows, rows_at
from recall_jax.inputs.row_files import Row
from recall_jax.inputs.shapes import USUAL, Chat, Fields, row_content, used_columns
from recall_jax.inputs.tokens import Tokenizer
from recall_jax.inputs.vocabularies import Difference

INPUT_IDS = "input_ids"  # the field of a row that is given by its tokens


@dataclass(frozen=True)
class Tokenized:
    """Hold n rows of a data file: their numbers (zero-based, ascending), fields, and token ids.

    If `source` is set, rows have only the fields that were used.
    """

    indices: np.ndarray  # (n,) int64
    rows: tuple[Row, ...]
    texts: tuple[str, ...]
    token_ids: tuple[list[int], ...]
    source: Path | None = None

    def take(self, places: Sequence[int] | np.ndarray) -> "Tokenized":
        """Select the rows at these positions, in this order."""
        return Tokenized(
            self.indices[places],
            tuple(self.rows[place] for place in places),
            tuple(self.texts[place] for place in places),
            tuple(self.token_ids[place] for place in places),
            self.source,
        )

    def digest(self) -> str:
        """Return a checksum of the row numbers and token ids."""
        ids = np.concatenate([np.asarray(row, np.int64) for row in self.token_ids])
        lengths = np.asarray([len(row) for row in self.token_ids], np.int64)
        content = b"".join(array.tobytes() for array in (self.indices, lengths, ids))
        return hashlib.sha256(content).hexdigest()

    def typical_rows(self) -> list[dict[str, Any]]:
        """Return the rows as in `typical.jsonl`: all their fields, and their number as `row`."""
        rows = self.rows if self.source is None else rows_at(self.source, self.indices)
        return [{**row, "row": int(index)} for row, index in zip(rows, self.indices, strict=True)]


def read_pool(
    path: Path,
    tokenizer: Tokenizer,
    *,
    fields: Fields = USUAL,
    max_tokens: int,
    pool: int,
    seed: int,
    memory: int | None = None,
) -> Tokenized:
    """Draw at most `pool` rows of a data file by `seed` without replacement, and tokenise them.

    Raises InputError if they take more than `memory` bytes before tokenisation.
    """
    columns = partial(used_columns, fields=fields)
    indices, rows = draw_rows(path, pool, seed, columns=columns, memory=memory)
    found = _tokenize(path, indices, rows, tokenizer, fields, max_tokens)
    return replace(found, source=path) if path.suffix.lower() == ".parquet" else found


def read_typical(
    path: Path,
    tokenizer: Tokenizer,
    *,
    fields: Fields = USUAL,
    max_tokens: int,
    memory: int | None = None,
) -> Tokenized:
    """Tokenise all rows of a file of typical samples.

    Their numbers are their `row` fields if these are all different, as `recall select` writes them,
    else their positions in this file. A row's `input_ids` replace its text: rows that were drawn
    have them if the text tokenises differently. Raises InputError as `read_pool` does.
    """
    rows = read_rows(path, memory=memory)
    numbers = [row.get("row") for row in rows]
    numbered = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    if numbered and len(set(numbers)) == len(numbers):
        rows = sorted(rows, key=lambda row: row["row"])
        indices = np.asarray([row["row"] for row in rows], np.int64)
    else:
        indices = np.arange(len(rows))
    return _tokenize(path, indices, rows, tokenizer, fields, max_tokens, by_ids=True)


def check_vocabulary(samples: Tokenized, vocab_size: int, model: str) -> None:
    """Raise InputError if a token id is not in the model's vocabulary."""
    largest = max(max(ids) for ids in samples.token_ids)
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer gives token id {largest}, but {model} has {vocab_size} embeddings: "
            "use the tokenizer that belongs to the model"
        )


def check_readers(samples: Tokenized, differences: Iterable[Difference]) -> None:
    """Raise InputError if the samples are different texts for a model whose tokenizer differs."""
    used = {token for ids in samples.token_ids for token in ids}
    for difference in differences:
        difference.check(used)


def _tokenize(
    path: Path,
    indices: np.ndarray,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    fields: Fields,
    max_tokens: int,
    by_ids: bool = False,
) -> Tokenized:
    texts, token_ids = [], []
    for index, row in zip(indices, rows, strict=True):
        where = f"{path}, row {index} (from 0)"
        content = row_content(row, where, fields)
        is_chat = isinstance(content, Chat)
        text = (
            tokenizer.chat_text(content.messages) if isinstance(content, Chat) else "".join(content)
        )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = f"{where} holds half a surrogate pair, which is no text: repair it"
            raise InputError(message) from error
        if by_ids and INPUT_IDS in row:
            ids = _given_ids(row[INPUT_IDS], where)[:max_tokens]
        else:
            # A chat template includes the special tokens.
            ids = tokenizer.encode(text, max_tokens, not is_chat)
        if not ids:
            raise InputError(f"{where} tokenises to nothing: remove it or give it text")
        texts.append(text)
        token_ids.append(ids)
    return Tokenized(indices, tuple(rows), tuple(texts), tuple(token_ids))


def _given_ids(ids: Any, where: str) -> list[int]:
    if isinstance(ids, list) and ids and all(type(each) is int and each >= 0 for each in ids):
        return ids
    raise InputError(f"{where}: {INPUT_IDS} is no list of token ids: repair it or leave it out")
