"""Extraction reads what the hidden states depend on, in as many passes as the memory asks for."""

import bisect

import numpy as np
import pytest

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.engine import batching
from recall_jax.engine.extract import pooled_states
from recall_jax.errors import InputError
from recall_jax.models.config import read_architecture

ROWS = [[3, 4, 5], [6, 7], [8], [9, 10, 11, 12], [13, 14]]


@pytest.fixture
def model(toys):
    return open_checkpoint(toys.qwen2[0])


def test_the_output_projection_is_not_read(model):
    states = pooled(model, plan(model, batch_size=2))
    arch = read_architecture(model.config)
    assert states.shape == (len(arch.units), len(ROWS), arch.hidden_size)
    assert not arch.tie_word_embeddings
    assert model.bytes_read == model.nbytes - model.specs["lm_head.weight"].nbytes


def test_a_tight_budget_takes_more_passes_to_the_same_states(model, monkeypatch):
    monkeypatch.setattr(batching, "held_bytes", lambda: 0)
    loose = pooled(model, plan(model))
    read = model.bytes_read
    # the smallest budget that is not refused has room for one row at a time
    least = bisect.bisect_left(range(1 << 30), True, key=lambda budget: fits(model, budget))
    passes = plan(model, budget=least)
    assert len(passes.rows) == len(ROWS)
    tight = pooled(model, passes)
    assert model.bytes_read == read * (1 + len(passes.rows))
    np.testing.assert_array_equal(tight, loose)


def test_passes_share_the_long_rows(model):
    arch = read_architecture(model.config)
    lengths = [16] * 50 + [500] * 50
    total = batching.batched_hidden_bytes(arch, lengths, 4, 4)
    one = batching.fit_passes(
        arch,
        lengths,
        num_units=1,
        batch_size=4,
        itemsize=4,
        stored_itemsize=2,
        overhead=0,
        budget=1 << 40,
    )
    tight = batching.fit_passes(
        arch,
        lengths,
        num_units=1,
        batch_size=4,
        itemsize=4,
        stored_itemsize=2,
        overhead=0,
        budget=one.needed_bytes - 1,
    )
    assert len(one.rows) == 1 and len(tight.rows) == 2
    assert sorted(np.concatenate(tight.rows)) == list(range(100))
    for rows in tight.rows:
        states = batching.batched_hidden_bytes(arch, [lengths[row] for row in rows], 4, 4)
        assert states <= 0.6 * total


def plan(model, *, batch_size: int = 1, budget: int = 1 << 40) -> batching.Passes:
    arch = read_architecture(model.config)
    return batching.fit_passes(
        arch,
        [len(row) for row in ROWS],
        num_units=len(arch.units),
        batch_size=batch_size,
        itemsize=4,
        stored_itemsize=2,
        overhead=0,
        budget=budget,
    )


def pooled(model, passes: batching.Passes) -> np.ndarray:
    arch = read_architecture(model.config)
    return pooled_states(model, arch, ROWS, arch.units, passes=passes, dtype=np.float32)


def fits(model, budget: int) -> bool:
    try:
        plan(model, budget=budget)
    except InputError:
        return False
    return True
