"""Rows of text as training examples: token ids, and which of them the loss counts.

A completion or text is followed by the end of text, which counts; a chat template writes its own
ends.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.errors import InputError
from recall_jax.inputs.batches import padded_length
from recall_jax.inputs.parts import row_parts, tokenize_parts
from recall_jax.inputs.row_files import iterate_rows
from recall_jax.inputs.shapes import USUAL, Fields, used_columns
from recall_jax.inputs.tokens import Tokenizer
from recall_jax.training.ragged import Growing, Ragged
from recall_jax.training.step import TrainingBatch


@dataclass(frozen=True)
class Examples:
    """n tokenised rows: token ids (T_i,) int32, and 1 where the loss counts (T_i,) int8.

    `left_out` rows of the file had no token to count within the token limit.
    """

    token_ids: Ragged
    loss_masks: Ragged
    left_out: int = 0

    def __len__(self) -> int:
        """Number of rows n."""
        return len(self.token_ids)

    @property
    def num_counted(self) -> int:
        """Tokens that the loss counts in one epoch; a row's first token never does."""
        first = self.loss_masks.ends - self.loss_masks.lengths
        return int(self.loss_masks.values.sum() - self.loss_masks.values[first].sum())

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return int(self.token_ids.values.max())

    def take(self, places: Sequence[int] | np.ndarray) -> "Examples":
        """The rows at these places, in this order."""
        return replace(
            self,
            token_ids=self.token_ids.take(places),
            loss_masks=self.loss_masks.take(places),
        )

    def digest(self) -> str:
        """A checksum of all token ids and of what counts."""
        masks = self.loss_masks.values.astype(np.int32)
        digest = hashlib.sha256()
        for array in (self.token_ids.lengths, self.token_ids.values, masks):
            digest.update(array.data)
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """Sizes and digest, plain values."""
        return {
            "rows": len(self),
            "tokens": len(self.token_ids.values),
            "tokens_counted": self.num_counted,
            "rows_left_out": self.left_out,
            "sha256": self.digest(),
        }

    def warnings(self, path: str) -> list[str]:
        """What a user should know of the file at `path`, one line each."""
        if not self.left_out:
            return []
        return [
            f"{path}: {self.left_out} rows were left out, as they have no answer to learn or "
            "finetune.max_tokens cuts it off"
        ]


def read_examples(
    path: Path,
    tokenizer: Tokenizer,
    *,
    end_of_text: int,
    max_tokens: int,
    fields: Fields = USUAL,
    memory: int | None = None,
) -> Examples:
    """All rows of a data file, cut on the right to `max_tokens`; only one is whole in memory.

    Raises InputError, with its number, for a row that tokenises to nothing, where no row has a
    token to count, and where the tokens take over `memory` bytes.
    """
    ids, masks, left_out = Growing("i"), Growing("b"), 0
    rows = iterate_rows(path, columns=partial(used_columns, fields=fields))
    for index, row in enumerate(rows):
        where = f"{path}, row {index} (from 0)"
        parts = row_parts(row, where, tokenizer, fields)
        tokens, counted = tokenize_parts(parts, tokenizer, where, end_of_text, max_tokens)
        if any(counted[1:]):
            ids.append(tokens)
            masks.append(counted)
            if memory is not None and ids.nbytes + masks.nbytes > memory:
                raise InputError(
                    f"the tokens of {path} take more than the {memory / (1 << 20):,.0f} MiB of "
                    "memory that are free: give fewer rows, or cut them with finetune.max_tokens"
                )
        else:
            left_out += 1
    examples = Examples(ids.rows(), masks.rows(), left_out)
    if not len(examples):
        raise InputError(
            f"{path}: no row has a token to learn within {max_tokens} tokens: allow more with "
            "finetune.max_tokens"
        )
    return examples


def hold_out(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """(rows to train on, rows to validate on): the share is drawn by `seed`, at least one row."""
    count = max(1, round(share * len(examples)))
    if count >= len(examples):
        raise InputError(
            f"finetune.validation_share {share} of {len(examples)} rows leaves none to train on"
        )
    order = np.random.default_rng([seed, len(examples)]).permutation(len(examples))
    return examples.take(np.sort(order[count:])), examples.take(np.sort(order[:count]))


def rows_of_step(step: int, num_rows: int, rows_per_step: int, seed: int) -> np.ndarray:
    """The rows of a step, counted from 0: every epoch has all rows once, in an order of its own.

    It depends on nothing but the arguments. The last step of an epoch may have fewer rows.
    """
    epoch, place = divmod(step, steps_per_epoch(num_rows, rows_per_step))
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    return order[place * rows_per_step : (place + 1) * rows_per_step]


def steps_per_epoch(num_rows: int, rows_per_step: int) -> int:
    """Steps in which every row comes once."""
    return -(-num_rows // rows_per_step)


def make_training_batch(
    examples: Examples, rows: np.ndarray, shape: tuple[int, ...]
) -> TrainingBatch:
    """These rows, padded to `shape` + (T,) with T the `padded_length` of the longest.

    There may be fewer rows than `shape` has room for: empty ones fill it.
    """
    length = padded_length(max(len(examples.token_ids[row]) for row in rows))
    batch = TrainingBatch(
        *(np.zeros((int(np.prod(shape)), length), np.int32) for _ in TrainingBatch._fields)
    )
    for place, row in enumerate(rows):
        ids, mask = examples.token_ids[row], examples.loss_masks[row]
        batch.input_ids[place, : len(ids)] = ids
        batch.attention_mask[place, : len(ids)] = 1
        batch.loss_mask[place, : len(ids)] = mask
    return TrainingBatch(*(array.reshape(*shape, length) for array in batch))


def validation_batches(examples: Examples, batch_size: int) -> list[TrainingBatch]:
    """All rows in batches of similar length."""
    by_length = np.argsort(examples.token_ids.lengths, kind="stable")
    starts = range(0, len(by_length), batch_size)
    return [
        make_training_batch(examples, by_length[start : start + batch_size], (batch_size,))
        for start in starts
    ]
