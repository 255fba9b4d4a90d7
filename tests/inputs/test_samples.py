"""Samples: a seeded draw of rows as token ids, each fault with its row."""

import json

import numpy as np
import pytest

from recall_jax.errors import InputError
from recall_jax.inputs.samples import check_vocabulary, read_pool, read_typical
from recall_jax.inputs.shapes import Fields


class Words:
    """A token for each word, its length; 0 in front of a text where special tokens are asked."""

    def encode(self, text, max_tokens, special_tokens):
        return ([0] * special_tokens + [len(word) for word in text.split()])[:max_tokens]

    def chat_text(self, messages):
        return " ".join(message["content"] for message in messages)


class Bare(Words):
    def encode(self, text, max_tokens, special_tokens):
        return super().encode(text, max_tokens, False)


def write(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pool_of(path, tokenizer=None, **options):
    options = {"max_tokens": 9, "pool": 100, "seed": 0, **options}
    return read_pool(path, tokenizer or Words(), **options)


def test_rows_texts_and_ids(tmp_path):
    rows = [
        {"text": "one three", "n": 1},
        {"prompt": "a ", "completion": "bb"},
        {"messages": [{"content": "ccc"}, {"content": "d"}]},
    ]
    samples = pool_of(write(tmp_path, rows))
    assert samples.indices.tolist() == [0, 1, 2] and samples.rows == tuple(rows)
    assert samples.texts == ("one three", "a bb", "ccc d")
    # A chat template writes its special tokens itself.
    assert samples.token_ids == ([0, 3, 5], [0, 1, 2], [3, 1])
    assert pool_of(write(tmp_path, rows), max_tokens=2).token_ids == ([0, 3], [0, 1], [3, 1])


def test_a_field_of_ones_own(tmp_path):
    samples = pool_of(write(tmp_path, [{"text": "a", "body": "bb"}]), fields=Fields("body"))
    assert samples.token_ids == ([0, 2],)


def test_the_draw_is_seeded_ascending_and_without_replacement(tmp_path):
    path = write(tmp_path, [{"text": "x" * row} for row in range(1, 201)])
    drawn = pool_of(path, pool=50, seed=3)
    assert len(drawn.rows) == len(set(drawn.indices.tolist())) == 50
    assert (np.diff(drawn.indices) > 0).all() and drawn.indices.max() < 200
    # Each row is the one that its number says.
    assert [len(text) - 1 for text in drawn.texts] == drawn.indices.tolist()
    assert drawn.token_ids == pool_of(path, pool=50, seed=3).token_ids
    assert drawn.token_ids != pool_of(path, pool=50, seed=4).token_ids
    # A draw does not favour the first rows: each has the same chance.
    counts = np.zeros(200)
    for seed in range(100):
        counts[pool_of(path, pool=50, seed=seed).indices] += 1
    assert counts.sum() == 5000 and counts.max() < 50 and counts.min() > 5


@pytest.mark.parametrize("pool", [3, 4])
def test_a_pool_of_all_rows_is_the_file(tmp_path, pool):
    path = write(tmp_path, [{"text": text} for text in "abc"])
    assert pool_of(path, pool=pool).indices.tolist() == [0, 1, 2]


def test_take_keeps_everything_together(tmp_path):
    samples = pool_of(write(tmp_path, [{"text": "x" * row} for row in range(1, 6)]))
    taken = samples.take(np.array([1, 4]))
    assert taken.indices.tolist() == [1, 4] and taken.texts == ("xx", "xxxxx")
    assert taken.rows == ({"text": "xx"}, {"text": "xxxxx"})
    assert taken.token_ids == ([0, 2], [0, 5])
    assert taken.typical_rows() == [{"text": "xx", "row": 1}, {"text": "xxxxx", "row": 4}]


@pytest.mark.parametrize(
    ("rows", "tokenizer", "message"),
    [
        ([{"text": "a"}, {"text": " "}], Bare(), r"row 1 \(from 0\) tokenises to nothing"),
        ([{"text": "a"}, {"body": "b"}], Words(), r"row 1 \(from 0\) has neither text"),
        ([{"text": 7}], Words(), r"row 0 \(from 0\): field 'text' holds int"),
        ([{"text": "half \ud83d"}], Words(), r"row 0 \(from 0\) holds half a surrogate pair"),
        ([{"messages": []}], Words(), r"row 0 \(from 0\) tokenises to nothing"),
    ],
)
def test_the_row_at_fault_is_named(tmp_path, rows, tokenizer, message):
    path = write(tmp_path, rows)
    with pytest.raises(InputError, match=message) as caught:
        pool_of(path, tokenizer)
    assert str(path) in str(caught.value)


def test_a_row_outside_the_draw_is_not_looked_at(tmp_path):
    path = write(tmp_path, [{"text": "a"}] * 5 + [{"body": "b"}])
    seeds = [seed for seed in range(20) if 5 not in pool_indices(seed)]
    assert pool_of(path, pool=2, seed=seeds[0]).texts == ("a", "a")


def pool_indices(seed):
    return np.random.default_rng(seed).choice(6, 2, replace=False)


@pytest.mark.parametrize(
    ("numbers", "expected", "order"),
    [
        ([7, 3, 40], [3, 7, 40], "bac"),
        ([None, None, None], [0, 1, 2], "abc"),
        ([7, None, 3], [0, 1, 2], "abc"),
        ([7, 7, 3], [0, 1, 2], "abc"),
        (["7", "3", "4"], [0, 1, 2], "abc"),
        ([-1, 3, 4], [0, 1, 2], "abc"),
        ([True, False, 2], [0, 1, 2], "abc"),
    ],
)
def test_typical_samples_carry_their_rows(tmp_path, numbers, expected, order):
    rows = [
        {"text": text} if number is None else {"text": text, "row": number}
        for text, number in zip("abc", numbers, strict=True)
    ]
    samples = read_typical(write(tmp_path, rows), Words(), max_tokens=9)
    assert samples.indices.tolist() == expected and "".join(samples.texts) == order


def test_typical_rows_come_back_as_they_were_written(tmp_path):
    first = pool_of(write(tmp_path, [{"text": "x" * row} for row in range(1, 9)]))
    taken = first.take([2, 5, 6])
    again = read_typical(write(tmp_path, taken.typical_rows()), Words(), max_tokens=9)
    assert again.indices.tolist() == [2, 5, 6] and again.token_ids == taken.token_ids


def test_ids_beyond_the_vocabulary(tmp_path):
    samples = pool_of(write(tmp_path, [{"text": "a"}, {"text": "seven77 b"}]))
    check_vocabulary(samples, 8, "model")
    with pytest.raises(InputError, match="gives token id 7, but model has 7 embeddings"):
        check_vocabulary(samples, 7, "model")
