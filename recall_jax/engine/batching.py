"""Fit the batching of a forward pass to a memory budget: batch size, concurrent models, passes."""

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
SELECTION_BYTES = 112 * MIB  # for compiling the selection of typical samples
_COMPILATION_BYTES = 64 * MIB  # for the forward and the comparison


@dataclass(frozen=True)
class Batching:
    """Hold the rows per batch, the models run at once, and the total bytes of memory needed."""

    batch_size: int
    models_at_once: int
    needed_bytes: int


class Passes(NamedTuple):
    """Hold the rows per batch, the row numbers of each pass, and the total bytes of memory needed.

    Each pass reads one model from start to end, for its rows only.
    """

    batch_size: int
    rows: list[np.ndarray]
    needed_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**self._asdict(), "rows": [rows.tolist() for rows in self.rows]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Passes":
        """Return the passes that `to_json` converted to these values."""
        rows = [np.asarray(each, np.int64) for each in values["rows"]]
        return cls(values["batch_size"], rows, values["needed_bytes"])


def fit_batching(
    arch: Architecture,
    lengths: Sequence[int],
    *,
    num_models: int,
    batch_size: int,
    itemsize: int,
    stored_itemsize: int,
    budget: int,
    overhead: int,
    split: Split | None = None,
) -> Batching:
    """Return the largest batching of `num_models` models over rows of these lengths that fits.

    A parameter takes `stored_itemsize` bytes on disk and `itemsize` in the compute dtype.
    `overhead` is the number of bytes that the run adds to those that the process already holds,
    apart from the forward; `budget` is the limit for all of them. A batch has at most `batch_size`
    rows. Several models run at once on accelerators only, since on CPU this gains nothing. On a
    mesh, `split` says which part of everything a device holds; `batch_size` then applies to each
    device that splits the rows.

    Raises UnfinishedError if not even one row of one model at a time fits. Reads nothing.
    """
    side_by_side = 1 if split or _on_cpu() else num_models
    overhead += held_bytes() + _COMPILATION_BYTES
    for rows in _halvings(min(_global_batch_size(batch_size, split), len(lengths))):
        states = num_models * batched_hidden_bytes(arch, lengths, rows, itemsize, split)
        if split:
            states //= split.models
        for models_at_once in _divisors(side_by_side):
            if split:
                step = _sharded_step_bytes(
                    split, arch, lengths, rows, num_models, itemsize, stored_itemsize
                )
            else:
                step = _step_bytes(arch, lengths, rows, models_at_once, itemsize)
                step += _placed_bytes(arch, num_models, models_at_once, stored_itemsize)
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
    stored_itemsize: int,
    budget: int,
    overhead: int,
    split: Split | None = None,
) -> Batching:
    """Return the largest batching of models that run in sequence, each over its rows, that fits.

    `lengths` holds the row lengths for each model; everything else is as in `fit_batching`.
    """
    overhead += held_bytes() + _COMPILATION_BYTES
    all_lengths = [length for rows in lengths for length in rows]
    for rows in _halvings(min(_global_batch_size(batch_size, split), max(map(len, lengths)))):
        if split:
            states = sum(
                batched_hidden_bytes(arch, each, rows, itemsize, split) for each in lengths
            )
            step = _sharded_step_bytes(
                split, arch, all_lengths, rows, len(lengths), itemsize, stored_itemsize
            )
        else:
            states = sum(
                hidden_bytes(arch, make_batches([range(n) for n in each], rows), itemsize)
                for each in lengths
            )
            step = _step_bytes(arch, all_lengths, rows, 1, itemsize)
            step += _placed_bytes(arch, len(lengths), 1, stored_itemsize)
        batching = Batching(rows, 1, overhead + states + step)
        if batching.needed_bytes <= budget:
            return batching
    raise _too_large(batching.needed_bytes, budget, states, len(all_lengths), len(lengths))


def fit_passes(
    arch: Architecture,
    lengths: Sequence[int],
    *,
    num_units: int,
    batch_size: int,
    itemsize: int,
    stored_itemsize: int,
    budget: int,
    overhead: int,
    split: Split | None = None,
) -> Passes:
    """Return the fewest equal passes over one model that fit together with the pooled states.

    The pooled states of all rows in `num_units` units stay in memory; everything else is as in
    `fit_batching`.

    Raises UnfinishedError if not even a batch of one row fits.
    """
    longest = sorted(lengths)[-_global_batch_size(batch_size, split) :]
    # Three copies: as gathered, concatenated, and as the points to be clustered.
    pooled = 3 * num_units * len(lengths) * arch.hidden_size * _FLOAT32
    batching = fit_batching(
        arch,
        longest,
        num_models=1,
        batch_size=batch_size,
        itemsize=itemsize,
        stored_itemsize=stored_itemsize,
        budget=budget,
        overhead=overhead + SELECTION_BYTES + pooled,
        split=split,
    )
    states = batched_hidden_bytes(arch, longest, batching.batch_size, itemsize, split)
    total = batched_hidden_bytes(arch, lengths, batching.batch_size, itemsize, split)
    passes = min(-(-total // (budget - batching.needed_bytes + states)), len(lengths))
    # Dealt out by length, so that no pass gets all the long rows.
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
    """Return the bytes of one model's hidden states for rows of these lengths in padded batches."""
    rows = [range(length) for length in lengths]
    if split is None:
        return hidden_bytes(arch, make_batches(rows, min(batch_size, len(lengths))), itemsize)
    each = -(-batch_size // split.rows)
    batches = make_batches(rows, each * split.rows)
    return split.sharing_devices * hidden_bytes(arch, batches, itemsize) // split.rows


def _global_batch_size(batch_size: int, split: Split | None) -> int:
    """Return the rows in a batch over all devices."""
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
    """Return the bytes for one block on one batch: its parameters in use, and its activations."""
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
    stored_itemsize: int,
) -> int:
    """Return the bytes for one block on one batch over a mesh, including parameters in transfer.

    In transfer are a unit of all models and the next one, and at most one full tensor for each
    model that runs at the same time.
    """
    longest = padded_length(max(lengths))
    params = block_bytes(arch, itemsize)
    copied = copied_bytes(arch, 1, itemsize, on_cpu=_on_cpu())
    gathered = params if split.placed_shards > split.compute_shards else 0
    step = params // split.placed_shards + (gathered + copied) // split.compute_shards
    step += working_bytes(arch, -(-rows // split.rows), longest, 1)
    step += 2 * num_models * largest_unit_bytes(arch, stored_itemsize) // split.read_shards
    step += split.models * largest_tensor_bytes(arch, stored_itemsize)
    return split.sharing_devices * step


def _placed_bytes(
    arch: Architecture, num_models: int, models_at_once: int, stored_itemsize: int
) -> int:
    """Return the bytes of parameters in transfer to the forward, in their stored dtype.

    On CPU these are only the models that run, which are copied if not aligned in their files; on
    other devices, a unit of all models and the next one.
    """
    models = models_at_once if _on_cpu() else 2 * num_models
    return models * largest_unit_bytes(arch, stored_itemsize)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _divisors(number: int) -> list[int]:
    """Return the divisors of a number, the largest first: groups of models have equal sizes."""
    return [each for each in range(number, 0, -1) if number % each == 0]


def _halvings(rows: int) -> list[int]:
    return [rows >> shift for shift in range(rows.bit_length())]
