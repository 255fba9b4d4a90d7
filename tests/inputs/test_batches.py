"""Batches: every row once, in its place, padded on the right to one of few lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.inputs.batches import make_batches, padded_length

LENGTHS = (16, 32, 64, 128, *range(256, 4097, 128))

rows_of_ids = st.lists(
    st.integers(1, 300).flatmap(lambda n: st.just(list(range(1, n + 1)))), min_size=1, max_size=30
)


@given(rows_of_ids, st.integers(1, 9))
def test_rows_come_back_in_their_order(token_ids, batch_size):
    made = make_batches(token_ids, batch_size)
    ids = [row for batch in made.batches for row in batch.input_ids]
    masks = [row for batch in made.batches for row in batch.attention_mask]
    for row, expected in enumerate(token_ids):
        place = made.order[row]
        length = len(expected)
        np.testing.assert_array_equal(ids[place][:length], expected)
        np.testing.assert_array_equal(masks[place], np.arange(len(masks[place])) < length)
        assert not ids[place][length:].any()
    assert made.num_rows == len(token_ids) == len(set(made.order.tolist()))
    assert made.num_tokens == sum(map(len, token_ids))
    assert made.padded_tokens == sum(map(len, ids))


@given(rows_of_ids, st.integers(1, 9))
def test_few_shapes_and_the_fillers_in_the_first_batch(token_ids, batch_size):
    batches = make_batches(token_ids, batch_size).batches
    lengths = [batch.input_ids.shape[1] for batch in batches]
    assert lengths == sorted(lengths) and set(lengths) <= set(LENGTHS)
    for index, batch in enumerate(batches):
        assert batch.input_ids.shape == batch.attention_mask.shape
        assert len(batch.input_ids) == batch_size
        assert batch.input_ids.dtype == batch.attention_mask.dtype == np.int32
        empty = int((batch.attention_mask.sum(axis=1) == 0).sum())
        assert empty == (-len(token_ids) % batch_size if index == 0 else 0)
        # No shorter length would do.
        longest = int(batch.attention_mask.sum(axis=1).max())
        assert batch.input_ids.shape[1] == min(n for n in LENGTHS if n >= longest)


@pytest.mark.parametrize(
    ("length", "padded"),
    [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (128, 128), (129, 256), (257, 384)],
)
def test_padded_lengths(length, padded):
    assert padded_length(length) == padded


def test_a_batch_is_what_an_apply_fn_takes():
    (batch,) = make_batches([[5, 6]], 1).batches
    assert set(batch.as_dict()) == {"input_ids", "attention_mask"}
    assert batch.as_dict()["input_ids"][0, :3].tolist() == [5, 6, 0]
