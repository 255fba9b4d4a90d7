"""Training on a model far smaller than the demo's."""

import json
from itertools import islice

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from recall_jax.evaluation.strings import draw_exercises
from recall_jax.experiments.demo import train
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import from_flax
from recall_jax.models.forward import init_params

SMALL = train.CONFIG | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
ARCH = read_architecture(SMALL)
STEPS = 40


@pytest.fixture(scope="module", autouse=True)
def promotion_as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def batches():
    tokenizer, rows = train.make_demo_tokenizer(), draw_exercises(("rotate",), 0)
    return [train.make_demo_batch(tokenizer, list(islice(rows, 32))) for _ in range(STEPS)]


@pytest.fixture(scope="module")
def run(batches):
    """A function that trains from the same start, and its first result."""
    optimizer = train.make_optimizer(1e-2, STEPS)

    def again():
        return train.train_model(ARCH, optimizer, init_params(ARCH, jax.random.key(0)), batches)

    return again, again()


def test_training_lowers_the_loss(run):
    _, (_, losses) = run
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(np.log(len(train.VOCABULARY)), rel=0.02)
    assert losses[-1] < 0.65 * losses[0]


def test_training_again_gives_the_same_bits(run):
    again, (params, losses) = run
    repeated, same_losses = again()
    assert losses == same_losses
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, repeated)))


def test_a_batch_counts_the_answer_and_its_end_alone():
    tokenizer = train.make_demo_tokenizer()
    rows = [
        {"prompt": "sort dcba=", "completion": "abcd"},
        {"prompt": "swap abcdefgh=", "completion": "badcfehg"},
    ]
    batch = train.make_demo_batch(tokenizer, rows)
    assert {array.shape for array in batch} == {(2, train.LONGEST)}
    assert batch.attention_mask.sum(axis=1).tolist() == [11, train.LONGEST]
    end = train.VOCABULARY.index(train.END)
    for row, ids, mask, counts in zip(rows, *batch, strict=True):
        text = tokenizer.decode(ids[mask == 1], skip_special_tokens=False)
        assert text == row["prompt"] + row["completion"] + train.END
        *answer, last = ids[counts == 1]
        assert tokenizer.decode(answer) == row["completion"]
        assert last == end


def test_loss_is_that_of_transformers(tmp_path, run, batches):
    from transformers import AutoModelForCausalLM

    _, (params, _) = run
    train.save_demo_model(tmp_path / "model", ARCH, params, train.make_demo_tokenizer())
    (tmp_path / "model" / "config.json").write_text(json.dumps(SMALL))
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert {array.dtype for array in saved.values()} == {np.dtype(ml_dtypes.bfloat16)}
    for name, array in from_flax(ARCH, params).items():
        np.testing.assert_array_equal(saved[name], array.astype(ml_dtypes.bfloat16))

    network = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    input_ids, mask, is_answer = (torch.from_numpy(array).long() for array in batches[0])
    labels = torch.where(is_answer == 1, input_ids, -100)
    theirs = network(input_ids=input_ids, attention_mask=mask, labels=labels).loss.item()
    rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    ours = float(jax.jit(train.answer_loss, static_argnums=0)(ARCH, rounded, batches[0]))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_every_epoch_sees_all_rows_in_another_order():
    tokenizer = train.make_demo_tokenizer()
    rows = list(islice(draw_exercises(("sort",), 0), 2 * train.FINE_TUNING_BATCH_SIZE))
    steps = list(train.fine_tuning_batches(tokenizer, rows, 0))
    ids = np.stack([step.input_ids for step in steps])
    epochs = ids.reshape(train.FINE_TUNING_EPOCHS, len(rows), train.LONGEST)
    assert not np.array_equal(epochs[0], epochs[1])
    for epoch in epochs[1:]:
        np.testing.assert_array_equal(np.unique(epoch, axis=0), np.unique(epochs[0], axis=0))
