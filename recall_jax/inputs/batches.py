"""Batches of few fixed shapes, so that few programs are compiled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Right-padded tokens: `input_ids` and `attention_mask` are (B, T) int32."""

    input_ids: np.ndarray
    attention_mask: np.ndarray

    def as_dict(self) -> dict[str, np.ndarray]:
        """The batch as an `apply_fn` of `recall_jax.extract` takes it."""
        return self._asdict()


@dataclass(frozen=True)
class Batches:
    """n tokenised rows as batches of B rows, one of them filled with empty rows where n needs it.

    `order[i]` is where row i stands when the batches are laid end to end, fillers included.
    """

    batches: tuple[Batch, ...]
    order: np.ndarray

    @property
    def num_rows(self) -> int:
        """Number of rows n, fillers left out."""
        return len(self.order)

    @property
    def num_tokens(self) -> int:
        """Number of real tokens in all rows."""
        return sum(int(batch.attention_mask.sum()) for batch in self.batches)

    @property
    def padded_tokens(self) -> int:
        """Number of positions computed, padding included."""
        return sum(batch.input_ids.size for batch in self.batches)


def padded_length(length: int) -> int:
    """The length that a row of `length` tokens is padded to: 16, 32, 64, 128, then steps of 128."""
    if length <= 128:
        return max(16, 1 << (length - 1).bit_length())
    return -(-length // 128) * 128


def make_batches(token_ids: Sequence[Sequence[int]], batch_size: int) -> Batches:
    """Right-padded batches of `batch_size` rows of similar length.

    Padding is on the right, so that a causal model never sees it from a real token. The fillers
    are in the first batch, where rows are shortest and cost least.
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
