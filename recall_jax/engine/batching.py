"""Batching of a forward pass so that it fits a memory budget: batch size, models, passes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from recall_jax.engine.budget import MIB, held_bytes
from recall_jax.engine.memory import (
    Split,
    block_bytes,
    copied_bytes,
    hidden_bytes,
    largest_tensor_bytes,
    largest_unit_bytes,
    working_bytes,
)
from recall_jax.errors import UnfinishedError
from recall_jax.inputs.batches import make_batches, padded_length
from recall_jax.models.architecture import Architecture

_FLOAT32 = 4
SELECTION = 112 * MIB  # what compiling the selection of typical samples takes
_PROGRAMS = 64 * MIB  # what compiling the forward and the comparison takes


@dataclass(frozen=True)
class Batching:
    """The batching of a forward: rows in a batch, models side by side, and bytes needed in all."""

    batch_size: int
    models_at_once: int
    needed_bytes: int


class Passes(NamedTuple):
    """Rows in a batch, the row numbers of each pass over one model, and the bytes needed in all."""

    batch_size: int
    rows: list[np.ndarray]
    needed_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**self._asdict(), "rows": [rows.tolist() for rows in self.rows]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Passes":
        """The same again."""
        rows = [np.asarray(each, np.int64) for each in values["rows"]]
        return cls(values["batch_size"], rows, values["needed_bytes"])


def fit_batching(
    arch: Architecture,
    lengths: Sequence[int],
    *,
    num_models: int,
    batch_size: int,
    itemsize: int,
    stored: int,
    budget: int,
    overhead: int,
    split: Split | None = None,
) -> Batching:
    """Return the largest batching of a forward of `num_models` models over rows that fits.

    A parameter takes `stored` bytes on disk and `itemsize` where it is computed with. `overhead`
    are the bytes that the run adds to what the process holds by now, without the forward. Batches
    are never larger than asked. Models go side by side on accelerators only: on CPU that gains
    nothing. Over a mesh a `split` says what a device has of it all, which is then what is counted,
    and `batch_size` rows are asked for on each device that splits them.
    Raises UnfinishedError, before anything is read, where not even one row of one model at a time
    fits.
    """
    side_by_side = 1 if split or _on_cpu() else num_models
    overhead += held_bytes() + _PROGRAMS
    for rows in _halvings(min(_together(batch_size, split), len(lengths))):
        states = num_models * batched_hidden_bytes(arch, lengths, rows, itemsize, split)
        if split:
            states //= split.models
        for models_at_once in _divisors(side_by_side):
            if split:
                step = _sharded_step_bytes(split, arch, lengths, rows, num_models, itemsize, stored)
            else:
                step = _step_bytes(arch, lengths, rows, models_at_once, itemsize)
                step += _placed_bytes(arch, num_models, models_at_once, stored)
            batching = Batching(rows, models_at_once, overhead + states + step)
            if batching.needed_bytes <= budget:
                return batching
    raise _too_large(batching.needed_bytes, budget, states, len(lengths), num_models)


def fit_per_model_batching(
    arch: Architecture,
    lengths: Sequence[Sequence[int]],
    *,
    batch_size: int,
    itemsize: int,
    stored: int,
    budget: int,
    overhead: int,
    split: Split | None = None,
) -> Batching:
    """As `fit_batching`, of models one after the other, each over rows of its own lengths."""
    overhead += held_bytes() + _PROGRAMS
    together = [length for own in lengths for length in own]
    for rows in _halvings(min(_together(batch_size, split), max(map(len, lengths)))):
        if split:
            states = sum(batched_hidden_bytes(arch, own, rows, itemsize, split) for own in lengths)
            step = _sharded_step_bytes(split, arch, together, rows, len(lengths), itemsize, stored)
        else:
            states = sum(
                hidden_bytes(arch, make_batches([range(n) for n in own], rows), itemsize)
                for own in lengths
            )
            step = _step_bytes(arch, together, rows, 1, itemsize)
            step += _placed_bytes(arch, len(lengths), 1, stored)
        batching = Batching(rows, 1, overhead + states + step)
        if batching.needed_bytes <= budget:
            return batching
    raise _too_large(batching.needed_bytes, budget, states, len(together), len(lengths))


def fit_passes(
    arch: Architecture,
    lengths: Sequence[int],
    *,
    num_units: int,
    batch_size: int,
    itemsize: int,
    stored: int,
    budget: int,
    overhead: int,
    split: Split | None = None,
) -> Passes:
    """Rows in as few equal blocks as fit, to keep the pooled states of `num_units` units of each.

    `overhead` are the bytes that the run adds to what the process holds by now, without these.
    Raises UnfinishedError where not even one batch of one row fits.
    """
    longest = sorted(lengths)[-_together(batch_size, split) :]
    # as they are gathered, laid together, and as the points to be clustered
    pooled = 3 * num_units * len(lengths) * arch.hidden_size * _FLOAT32
    batching = fit_batching(
        arch,
        longest,
        num_models=1,
        batch_size=batch_size,
        itemsize=itemsize,
        stored=stored,
        budget=budget,
        overhead=overhead + SELECTION + pooled,
        split=split,
    )
    states = batched_hidden_bytes(arch, longest, batching.batch_size, itemsize, split)
    total = batched_hidden_bytes(arch, lengths, batching.batch_size, itemsize, split)
    passes = min(-(-total // (budget - batching.needed_bytes + states)), len(lengths))
    # dealt out by length, so that no pass gets all the long ones
    by_length = np.argsort(lengths, kind="stable")
    rows = [np.sort(by_length[first::passes]) for first in range(passes)]
    return Passes(batching.batch_size, rows, batching.needed_bytes - states + -(-total // passes))


def batched_hidden_bytes(
    arch: Architecture,
    lengths: Sequence[int],
    batch_size: int,
    itemsize: int,
    split: Split | None = None,
) -> int:
    """Bytes of one model's hidden states of rows of these lengths, in batches."""
    rows = [range(length) for length in lengths]
    if split is None:
        return hidden_bytes(arch, make_batches(rows, min(batch_size, len(lengths))), itemsize)
    each = -(-batch_size // split.rows)
    batches = make_batches(rows, each * split.rows)
    return split.sharing_devices * hidden_bytes(arch, batches, itemsize) // split.rows


def _together(batch_size: int, split: Split | None) -> int:
    """Rows in a batch of all devices."""
    return batch_size * (split.rows if split else 1)


def _too_large(
    needed: int, budget: int, states: int, num_rows: int, num_models: int
) -> UnfinishedError:
    return UnfinishedError(
        f"this needs {needed / MIB:,.0f} MiB of memory and may take {budget / MIB:,.0f} MiB, "
        f"{states / MIB:,.0f} MiB of it for the hidden states of {num_rows} rows in "
        f"{num_models} model{'s' * (num_models > 1)}: allow more memory, or take fewer or "
        "shorter samples (--memory, samples.count, samples.pool, samples.max_tokens)"
    )


def _step_bytes(
    arch: Architecture, lengths: Sequence[int], rows: int, models_at_once: int, itemsize: int
) -> int:
    """Of one block and one batch: its parameters as they are used, and what it computes with."""
    longest = padded_length(max(lengths))
    params = models_at_once * block_bytes(arch, itemsize)
    params += copied_bytes(arch, models_at_once, itemsize, on_cpu=_on_cpu())
    return params + working_bytes(arch, rows, longest, models_at_once)


def _sharded_step_bytes(
    split: Split,
    arch: Architecture,
    lengths: Sequence[int],
    rows: int,
    num_models: int,
    itemsize: int,
    stored: int,
) -> int:
    """Of one block and one batch over a mesh: what it computes with, and what is on its way to it.

    That are the parameters of all models, of a unit and of the next, and at most one full
    tensor of those that run.
    """
    longest = padded_length(max(lengths))
    params = block_bytes(arch, itemsize)
    copied = copied_bytes(arch, 1, itemsize, on_cpu=_on_cpu())
    gathered = params if split.placed_shards > split.compute_shards else 0
    step = params // split.placed_shards + (gathered + copied) // split.compute_shards
    step += working_bytes(arch, -(-rows // split.rows), longest, 1)
    step += 2 * num_models * largest_unit_bytes(arch, stored) // split.read_shards
    step += split.models * largest_tensor_bytes(arch, stored)
    return split.sharing_devices * step


def _placed_bytes(arch: Architecture, num_models: int, models_at_once: int, stored: int) -> int:
    """Parameters on their way into the forward, as stored.

    On CPU they are those of the models that run, which may not be aligned in their files; elsewhere
    those of all models, of a unit and of the next.
    """
    models = models_at_once if _on_cpu() else 2 * num_models
    return models * largest_unit_bytes(arch, stored)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _divisors(number: int) -> list[int]:
    """From the largest to 1: groups of models are all of one size."""
    return [each for each in range(number, 0, -1) if number % each == 0]


def _halvings(rows: int) -> list[int]:
    return [rows >> shift for shift in range(rows.bit_length())]
