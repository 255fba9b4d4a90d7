"""Make training examples of rows of text: token ids, and which of them the loss counts.

The end-of-text token is appended to a completion or text, and is counted; a chat template writes
its ends itself.
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
from recall_jax.training.ragged import Ragged, RaggedBuilder
from recall_jax.training.step import TrainingBatch


@dataclass(frozen=True)
class Examples:
    """Hold n tokenised rows: token ids (T_i,) int32, and loss masks (T_i,) int8 of 0 and 1.

    `left_out` counts the rows of the file with no token to learn within the token limit.
    """

    token_ids: Ragged
    loss_masks: Ragged
    left_out: int = 0

    def __len__(self) -> int:
        """Return the number of rows n."""
        return len(self.token_ids)

    @property
    def num_counted(self) -> int:
        """Return the number of tokens that the loss counts in one epoch, never a row's first."""
        first = self.loss_masks.ends - self.loss_masks.lengths
        return int(self.loss_masks.values.sum() - self.loss_masks.values[first].sum())

    @property
    def largest_id(self) -> int:
        """Return the largest token id."""
        return int(self.token_ids.values.max())

    def take(self, rows: Sequence[int] | np.ndarray) -> "Examples":
        """Return the rows with these indices, in this order."""
        return replace(
            self,
            token_ids=self.token_ids.take(rows),
            loss_masks=self.loss_masks.take(rows),
        )

    def digest(self) -> str:
        """Return a SHA-256 checksum of all token ids and loss masks."""
        masks = self.loss_masks.values.astype(np.int32)
        digest = hashlib.sha256()
        for array in (self.token_ids.lengths, self.token_ids.values, masks):
            digest.update(array.data)
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """Return the sizes and the digest, as the training record states them."""
        return {
            "rows": len(self),
            "tokens": len(self.token_ids.values),
            "tokens_counted": self.num_counted,
            "rows_left_out": self.left_out,
            "sha256": self.digest(),
        }

    def warnings(self, path: str) -> list[str]:
        """Return warnings about the file at `path` that the rows came from, one line each."""
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
    """Tokenise all rows of a data file, truncated on the right to `max_tokens`.

    Only one row of text is in memory at a time. Raises InputError, with its number, for a row that
    tokenises to nothing, if no row has a token to count, and if the tokens take more than `memory`
    bytes.
    """
    ids, masks, left_out = RaggedBuilder("i"), RaggedBuilder("b"), 0
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
                    "memory that are free: give fewer or shorter rows (finetune.max_tokens)"
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
    """Split into rows to train on and rows to validate on, in this order.

    `share` of the rows, at least one, are drawn by `seed` to validate on. Raises InputError if that
    leaves none to train on.
    """
    count = max(1, round(share * len(examples)))
    if count >= len(examples):
        raise InputError(
            f"finetune.validation_share {share} of {len(examples)} rows leaves none to train on"
        )
    order = np.random.default_rng([seed, len(examples)]).permutation(len(examples))
    return examples.take(np.sort(order[count:])), examples.take(np.sort(order[:count]))


def rows_of_step(step: int, num_rows: int, rows_per_step: int, seed: int) -> np.ndarray:
    """Return the row indices of a step, counted from 0: every epoch shuffles all rows anew.

    They depend only on the arguments. The last step of an epoch may have fewer rows.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch(num_rows, rows_per_step))
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    return order[step_in_epoch * rows_per_step : (step_in_epoch + 1) * rows_per_step]


def steps_per_epoch(num_rows: int, rows_per_step: int) -> int:
    """Return the number of steps in which every row is used once."""
    return -(-num_rows // rows_per_step)


def make_training_batch(
    examples: Examples, rows: np.ndarray, shape: tuple[int, ...]
) -> TrainingBatch:
    """Make a batch of these rows with arrays `shape` + (T,), T the `padded_length` of the longest.

    Empty rows are appended if there are fewer rows than `shape` holds.
    """
    length = padded_length(max(len(examples.token_ids[row]) for row in rows))
    batch = TrainingBatch(
        *(np.zeros((int(np.prod(shape)), length), np.int32) for _ in TrainingBatch._fields)
    )
    for index, row in enumerate(rows):
        ids, mask = examples.token_ids[row], examples.loss_masks[row]
        batch.input_ids[index, : len(ids)] = ids
        batch.attention_mask[index, : len(ids)] = 1
        batch.loss_mask[index, : len(ids)] = mask
    return TrainingBatch(*(array.reshape(*shape, length) for array in batch))


def validation_batches(examples: Examples, batch_size: int) -> list[TrainingBatch]:
    """Return all rows in batches of rows of similar length."""
    by_length = np.argsort(examples.token_ids.lengths, kind="stable")
    starts = range(0, len(by_length), batch_size)
    return [
        make_training_batch(examples, by_length[start : start + batch_size], (batch_size,))
        for start in starts
    ]
