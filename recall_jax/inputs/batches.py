"""Make batches of a few fixed shapes, so that few programs are compiled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Hold right-padded tokens: `input_ids` and `attention_mask` are (B, T) int32."""

    input_ids: np.ndarray
    attention_mask: np.ndarray

    def as_dict(self) -> dict[str, np.ndarray]:
        """Return the batch as an `apply_fn` of `recall_jax.extract` takes it."""
        return self._asdict()


@dataclass(frozen=True)
class Batches:
    """Hold n tokenised rows in batches of B rows, one of which has empty rows if n requires it.

    `order[i]` is the position of row i in the concatenated batches, empty rows included.
    """

    batches: tuple[Batch, ...]
    order: np.ndarray

    @property
    def num_rows(self) -> int:
        """Return the number n of rows, without the empty ones."""
        return len(self.order)

    @property
    def num_tokens(self) -> int:
        """Return the number of real tokens in all rows."""
        return sum(int(batch.attention_mask.sum()) for batch in self.batches)

    @property
    def padded_tokens(self) -> int:
        """Return the number of positions computed, padding included."""
        return sum(batch.input_ids.size for batch in self.batches)


def padded_length(length: int) -> int:
    """Return the padded length for `length` tokens: 16, 32, 64, 128, then multiples of 128."""
    if length <= 128:
        return max(16, 1 << (length - 1).bit_length())
    return -(-length // 128) * 128


def make_batches(token_ids: Sequence[Sequence[int]], batch_size: int) -> Batches:
    """Make right-padded batches of `batch_size` rows of similar length.

    Padding is on the right, where a causal model never sees it from a real token. Empty rows are in
    the first batch, whose rows are the shortest and cost least.
    """
    by_length = sorted(range(len(token_ids)), key=lambda row: len(token_ids[row]))
    missing = -len(token_ids) % batch_size
    order = np.empty(len(token_ids), np.int64)
    batches: list[Batch] = []
    for start in range(-missing, len(token_ids), batch_size):
        rows = by_length[max(start, 0) : start + batch_size]
        length = padded_length(len(token_ids[rows[-1]]))
        input_ids = np.zeros((batch_size, length), np.int32)
        attention_mask = np.zeros((batch_size, length), np.int32)
        for place, row in enumerate(rows):
            ids = token_ids[row]
            input_ids[place, : len(ids)] = ids
            attention_mask[place, : len(ids)] = 1
            order[row] = len(batches) * batch_size + place
        batches.append(Batch(input_ids, attention_mask))
    return Batches(tuple(batches), order)
