"""How a forward pass is cut so that it fits a budget of memory: batches, models, passes."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from recall_jax.engine.budget import MIB, taken_bytes
from recall_jax.engine.memory import block_bytes, hidden_bytes, working_bytes
from recall_jax.errors import InputError
from recall_jax.models.architecture import Architecture
from recall_jax.representations.batches import make_batches, padded_length


@dataclass(frozen=True)
class Cut:
    """How a forward pass is cut: rows in a batch, models side by side; bytes it needs in all."""

    batch_size: int
    models_at_once: int
    needed: int


def cut_forward(
    arch: Architecture,
    lengths: Sequence[int],
    *,
    num_models: int,
    batch_size: int,
    itemsize: int,
    budget: int,
    beside: int,
) -> Cut:
    """The widest cut of a forward of `num_models` models over rows of these lengths that fits.

    `beside` are bytes that the run needs beside the forward. Batches are never larger than asked.
    Models go side by side on accelerators only: on CPU that gains nothing. Raises InputError,
    before anything is read, where not even one row of one model at a time fits.
    """
    side_by_side = 1 if jax.default_backend() == "cpu" else num_models
    for rows in _halvings(min(batch_size, len(lengths))):
        states = num_models * hidden_bytes_of(arch, lengths, rows, itemsize)
        for models_at_once in range(side_by_side, 0, -1):
            step = _one_step(arch, lengths, rows, models_at_once, itemsize)
            cut = Cut(rows, models_at_once, beside + states + step)
            if cut.needed <= budget:
                return cut
    raise InputError(
        f"this needs {cut.needed / MIB:,.0f} MiB of memory and may take "
        f"{budget / MIB:,.0f} MiB: the hidden states of {len(lengths)} rows in {num_models} "
        f"models take {states / MIB:,.0f} MiB; allow "
        "more with --memory, or take fewer (--count) or shorter (--max-tokens) samples"
    )


def cut_rows(
    arch: Architecture,
    lengths: Sequence[int],
    *,
    batch_size: int,
    itemsize: int,
    budget: int,
) -> tuple[int, list[np.ndarray]]:
    """Batch size, and row numbers in as few equal blocks as fit: a pass over one model for each.

    Raises InputError where not even one batch of one row fits.
    """
    beside = taken_bytes()
    longest = sorted(lengths)[-batch_size:]
    batch_size = cut_forward(
        arch,
        longest,
        num_models=1,
        batch_size=batch_size,
        itemsize=itemsize,
        budget=budget,
        beside=beside,
    ).batch_size
    total = hidden_bytes_of(arch, lengths, batch_size, itemsize)
    room = budget - beside - _one_step(arch, lengths, batch_size, 1, itemsize)
    passes = min(-(-total // room), len(lengths))
    return batch_size, np.array_split(np.arange(len(lengths)), passes)


def hidden_bytes_of(
    arch: Architecture, lengths: Sequence[int], batch_size: int, itemsize: int
) -> int:
    """Bytes of one model's hidden states of rows of these lengths, in batches."""
    batches = make_batches([range(length) for length in lengths], min(batch_size, len(lengths)))
    return hidden_bytes(arch, batches, itemsize)


def _one_step(
    arch: Architecture, lengths: Sequence[int], rows: int, models_at_once: int, itemsize: int
) -> int:
    """Of one block and one batch: its parameters as they are used, and what it computes with."""
    longest = padded_length(max(lengths))
    params = models_at_once * block_bytes(arch, itemsize)
    return params + working_bytes(arch, rows, longest, models_at_once, itemsize)


def _halvings(rows: int) -> list[int]:
    return [rows >> shift for shift in range(rows.bit_length())]
