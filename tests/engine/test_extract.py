"""Extraction reads what the hidden states depend on, in as many passes as the memory asks for."""

import bisect

import numpy as np
import pytest

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.engine import cut
from recall_jax.engine.extract import pooled_states
from recall_jax.errors import InputError
from recall_jax.models.config import read_architecture

ROWS = [[3, 4, 5], [6, 7], [8], [9, 10, 11, 12], [13, 14]]


@pytest.fixture
def model(toys):
    return open_checkpoint(toys.qwen2[0])


def test_the_output_projection_is_not_read(model):
    arch = read_architecture(model.config)
    states, passes = pooled_states(
        model, arch, ROWS, arch.units, batch_size=2, dtype=np.float32, budget=1 << 40
    )
    assert states.shape == (len(arch.units), len(ROWS), arch.hidden_size) and passes == 1
    assert not arch.tie_word_embeddings
    assert model.bytes_read == model.nbytes - model.specs["lm_head.weight"].nbytes


def test_a_tight_budget_takes_more_passes_to_the_same_states(model, monkeypatch):
    monkeypatch.setattr(cut, "held_bytes", lambda: 0)
    arch = read_architecture(model.config)
    loose, _ = pooled_states(
        model, arch, ROWS, arch.units, batch_size=1, dtype=np.float32, budget=1 << 40
    )
    read = model.bytes_read
    # the smallest budget that is not refused has room for one row at a time
    least = bisect.bisect_left(range(1 << 30), True, key=lambda budget: _fits(arch, budget))
    tight, passes = pooled_states(
        model, arch, ROWS, arch.units, batch_size=1, dtype=np.float32, budget=least
    )
    assert passes == len(ROWS)
    assert model.bytes_read == read * (1 + passes)
    np.testing.assert_array_equal(tight, loose)


def _fits(arch, budget: int) -> bool:
    try:
        sizes = {"num_units": len(arch.units), "itemsize": 4, "stored": 2}
        cut.cut_rows(arch, [len(row) for row in ROWS], batch_size=1, budget=budget, **sizes)
    except InputError:
        return False
    return True
