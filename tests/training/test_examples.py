"""Rows of text as training examples, with the tokenizers that models come with."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from toys import make_tokenizer
from transformers import PreTrainedTokenizerFast

from recall_jax.errors import InputError
from recall_jax.inputs.shapes import Fields
from recall_jax.inputs.tokens import load_tokenizer
from recall_jax.training.examples import (
    Examples,
    hold_out,
    make_training_batch,
    read_examples,
    rows_of_step,
    steps_per_epoch,
    validation_batches,
)

END = 1
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% if loop.last %}{{ message.content }}{% endif %};{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer([folder], "qwen2")


def with_template(folder, template, tmp_path):
    slow = PreTrainedTokenizerFast.from_pretrained(folder)
    slow.chat_template = template
    slow.save_pretrained(tmp_path / "chat")
    return load_tokenizer([tmp_path / "chat"], "qwen2")


def examples(tmp_path, tokenizer, *rows, max_tokens=64, **options) -> Examples:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(path, tokenizer, end_of_text=END, max_tokens=max_tokens, **options)


def shown(found: Examples, row=0) -> tuple[str, str]:
    """The text of a row, and of what counts in it; `$` is the end of text."""
    letters = ["$" if i == END else chr(i + 30) for i in found.token_ids[row]]
    counted = [c for c, counts in zip(letters, found.loss_masks[row], strict=True) if counts]
    return "".join(letters), "".join(counted)


def test_of_a_prompt_and_its_completion_the_completion_and_its_end_count(tmp_path, tokenizer):
    found = examples(tmp_path, tokenizer, {"prompt": "ab=", "completion": "ba"})
    assert shown(found) == ("ab=ba$", "ba$")
    assert found.num_counted == 3


def test_of_a_text_everything_counts_but_its_first_token_which_follows_nothing(tmp_path, tokenizer):
    found = examples(tmp_path, tokenizer, {"text": "abc", "prompt": "x", "completion": "y"})
    assert shown(found) == ("abc$", "abc$")
    assert found.num_counted == 3
    assert shown(examples(tmp_path, tokenizer, {"body": "abc"}, fields=Fields("body")))[0] == "abc$"


def test_of_messages_the_turns_of_the_assistant_count(tmp_path, folder):
    chat = with_template(folder, CHAT, tmp_path)
    messages = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "!"},
    ]
    found = examples(tmp_path, chat, {"messages": messages})
    assert shown(found) == ("<user>1;<assistant>one;<user>2;<assistant>two;<user>!;", "one;two;")


def test_where_turns_cannot_be_told_apart_the_row_is_refused(tmp_path, folder):
    chat = with_template(folder, FORGETFUL, tmp_path)
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    with pytest.raises(InputError, match=r"row 1 \(from 0\): the chat template writes the assist"):
        examples(tmp_path, chat, {"text": "good"}, {"messages": messages})


def test_a_chat_without_an_answer_teaches_nothing(tmp_path, folder):
    chat = with_template(folder, CHAT, tmp_path)
    question = {"role": "user", "content": "1"}
    answer = {"role": "assistant", "content": "one"}
    rows = [{"messages": [question]}, {"messages": [question, answer]}]
    found = examples(tmp_path, chat, *rows)
    assert (len(found), found.left_out) == (1, 1)
    assert "have no answer to learn" in found.warnings("x")[0]


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """A tokenizer with a token `=b`, which reaches over the border of `a=` and `b`."""
    folder = tmp_path_factory.mktemp("merging")
    names = ["<pad>", "<eos>", "a", "b", "=", "=b"]
    model = models.BPE({name: i for i, name in enumerate(names)}, [("=", "b")])
    core = Tokenizer(model)
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
    return load_tokenizer([folder], "qwen2")


def test_no_token_reaches_over_the_border_of_prompt_and_completion(tmp_path, merging):
    rows = [{"prompt": "a=", "completion": "ba"}, {"prompt": "a", "completion": "=ba"}]
    found = examples(tmp_path, merging, *rows)
    assert [ids.tolist() for ids in found.token_ids] == [[2, 4, 3, 2, 1], [2, 5, 2, 1]]
    assert [mask.tolist() for mask in found.loss_masks] == [[0, 0, 1, 1, 1], [0, 1, 1, 1]]


def test_rows_are_cut_and_those_that_teach_nothing_then_are_counted(tmp_path, tokenizer):
    rows = [{"prompt": "abcd", "completion": "x"}, {"prompt": "ab", "completion": "cdef"}]
    found = examples(tmp_path, tokenizer, *rows, max_tokens=4)
    assert (len(found), found.left_out) == (1, 1)
    assert shown(found) == ("abcd", "cd")
    (line,) = found.take([0]).warnings("rows.jsonl")
    assert line.startswith("rows.jsonl: 1 rows were left out")
    assert found.facts()["rows_left_out"] == 1
    with pytest.raises(InputError, match=r"no row has a token to learn within 4 tokens"):
        examples(tmp_path, tokenizer, rows[0], max_tokens=4)


def test_rows_far_too_long_are_cut_and_hardly_tokenised(tmp_path, tokenizer, monkeypatch):
    rows = [{"prompt": "ab", "completion": "x" * 10**6}, {"prompt": "y" * 10**6, "completion": "z"}]
    tokenized, encode = [], type(tokenizer).encode

    def heard(self, text, *others):
        tokenized.append(len(text))
        return encode(self, text, *others)

    monkeypatch.setattr(type(tokenizer), "encode", heard)
    found = examples(tmp_path, tokenizer, *rows, max_tokens=6)
    assert (len(found), found.left_out) == (1, 1) and max(tokenized) < 10**5
    assert shown(found) == ("abxxxx", "xxxx")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, r"row 1 \(from 0\) tokenises to nothing"),
        ({"prompt": "", "completion": ""}, r"row 1 \(from 0\) tokenises to nothing"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"row 1 \(from 0\): .* no chat templ"),
        ({"prompt": "x"}, r"row 1 \(from 0\) has neither text, nor prompt and completion"),
        ({"prompt": "x", "completion": 3}, r"row 1 .*'completion' holds int, not text"),
        ({"text": "\ud800"}, r"row 1 \(from 0\) holds half a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_learnt_is_named(tmp_path, tokenizer, row, message):
    with pytest.raises(InputError, match=message):
        examples(tmp_path, tokenizer, {"text": "good"}, row)


@given(
    num_rows=st.integers(1, 40),
    rows_per_step=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 3),
)
def test_every_epoch_has_every_row_once(num_rows, rows_per_step, seed, epoch):
    steps = steps_per_epoch(num_rows, rows_per_step)
    parts = [
        rows_of_step(epoch * steps + step, num_rows, rows_per_step, seed) for step in range(steps)
    ]
    assert all(0 < len(part) <= rows_per_step for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(num_rows))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [rows_of_step(step, 50, 50, seed) for step in (0, 1) for seed in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4


def test_a_batch_has_its_rows_and_empty_ones_where_they_are_few(tmp_path, tokenizer):
    found = examples(tmp_path, tokenizer, {"text": "abc"}, {"text": "a" * 20}, {"text": "d"})
    batch = make_training_batch(found, np.asarray([2, 1, 0]), (2, 2))
    assert {array.shape for array in batch} == {(2, 2, 32)}
    assert {array.dtype for array in batch} == {np.dtype(np.int32)}
    lengths = batch.attention_mask.sum(axis=-1)
    assert lengths.tolist() == [[2, 21], [4, 0]]
    for place, row in enumerate([2, 1, 0]):
        ids = batch.input_ids.reshape(4, 32)[place][: len(found.token_ids[row])]
        np.testing.assert_array_equal(ids, found.token_ids[row])
    np.testing.assert_array_equal(batch.loss_mask, batch.attention_mask)


def test_rows_held_out_are_not_trained_on(tmp_path, tokenizer):
    found = examples(tmp_path, tokenizer, *({"text": chr(97 + i) * (i + 1)} for i in range(20)))
    training, validation = hold_out(found, 0.25, seed=3)
    assert (len(training), len(validation)) == (15, 5)
    ids = [row.tobytes() for part in (training, validation) for row in part.token_ids]
    assert len(set(ids)) == 20
    batches = validation_batches(validation, 2)
    assert sum(int(batch.loss_mask[:, 1:].sum()) for batch in batches) == validation.num_counted
    with pytest.raises(InputError, match=r"leaves none to train on"):
        hold_out(found, 0.99, seed=0)


def test_the_digest_is_of_what_is_learnt(tmp_path, tokenizer):
    row = {"prompt": "ab", "completion": "c"}
    found = examples(tmp_path, tokenizer, row, {"text": "xy"})
    lengths = np.asarray([len(ids) for ids in found.token_ids], np.int64)
    masks = [np.asarray(mask, np.int32) for mask in found.loss_masks]
    parts = [lengths, *found.token_ids, *masks]
    expected = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    assert found.digest() == expected  # as those of runs that wait to be resumed
    same = [examples(tmp_path, tokenizer, row).digest() for _ in range(2)]
    others = [
        examples(tmp_path, tokenizer, {"text": "abc"}).digest(),
        examples(tmp_path, tokenizer, row, row).digest(),
    ]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 3
