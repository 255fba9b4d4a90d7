"""Full fine-tuning against transformers on torch; micro-batches against one batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import from_flax, tensor_shapes, to_flax
from recall_jax.training.loss import completion_loss
from recall_jax.training.methods import full_loss
from recall_jax.training.optimizer import adamw, learning_rate
from recall_jax.training.step import Objective, TrainingBatch, init_state, make_step

pytestmark = pytest.mark.optimised

STEPS, WARMUP, RATE, DECAY, CLIP = 20, 4, 5e-3, 0.1, 1.0
ROWS, LENGTH = 8, 16


@pytest.fixture(scope="module")
def base(toys):
    """(folder, architecture, parameters) of a tied float32 llama."""
    checkpoint = open_checkpoint(toys.llama[0])
    arch = read_architecture(checkpoint.config)
    params = to_flax(arch, {name: checkpoint.read(name) for name in tensor_shapes(arch)})
    return toys.llama[0], arch, params


@pytest.fixture(scope="module")
def batches():
    """Two in turn, of right-padded rows of 4 to 16 tokens; the second half of each counts."""
    found = []
    for step in range(STEPS):
        rng = np.random.default_rng(step % 2)
        lengths, place = rng.integers(4, LENGTH + 1, (ROWS, 1)), np.arange(LENGTH)[None]
        is_token = place < lengths
        ids = rng.integers(2, 97, (ROWS, LENGTH)) * is_token
        counted = is_token & (place >= lengths // 2)
        found.append(TrainingBatch(*(array.astype(np.int32) for array in (ids, is_token, counted))))
    return found


@pytest.fixture(scope="module")
def trained(base, batches):
    """Losses and last parameters of 20 steps on one device."""
    _, arch, params = base
    return run(arch, params, batches)


def optimizer():
    rate = learning_rate(RATE, "cosine", STEPS, WARMUP)
    return adamw(rate, weight_decay=DECAY, clip_norm=CLIP)


def run(arch, params, batches, parts=1):
    method = optimizer()
    step = make_step(Objective(full_loss(arch, dtype=jnp.float32)), method, None)
    state = jax.jit(lambda tree: init_state(tree, method))(params)
    losses = []
    for batch in batches:
        batch = TrainingBatch(*(array.reshape(parts, -1, array.shape[-1]) for array in batch))
        state, metrics = step(state, {}, batch, jax.random.key(0))
        losses.append(metrics.loss.item())
    return losses, state


def torch_loss(network, batch):
    ids, mask, counted = (torch.from_numpy(array).long() for array in batch)
    labels = torch.where(counted == 1, ids, -100)
    return network(input_ids=ids, attention_mask=mask, labels=labels).loss


def test_twenty_steps_are_those_of_transformers(base, batches, trained):
    folder, arch, _ = base
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=RATE)
    schedule = get_cosine_schedule_with_warmup(theirs, WARMUP, STEPS)
    expected = []
    for batch in batches:
        theirs.zero_grad()
        loss = torch_loss(network, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        theirs.step()
        schedule.step()
        expected.append(loss.item())
    losses, state = trained
    assert expected[-1] < 0.8 * expected[0]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-4)
    ours, named = from_flax(arch, state.trainable), dict(network.named_parameters())
    for name in tensor_shapes(arch):
        np.testing.assert_allclose(ours[name], named[name].detach(), rtol=0, atol=2e-4)


def test_gradients_of_rematerialised_blocks_are_those_of_transformers(base, batches):
    folder, arch, params = base
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    counted = int(batches[0].loss_mask[:, 1:].sum())
    loss = torch_loss(network, batches[0])
    (loss * counted).backward()

    @jax.jit
    def gradient(params):
        return jax.value_and_grad(
            lambda params: completion_loss(arch, params, batches[0], remat=True), has_aux=True
        )(params)

    (summed, tokens), ours = gradient(params)
    assert (summed.dtype, tokens.dtype, tokens.item()) == (jnp.float32, jnp.float32, counted)
    assert summed.item() / counted == pytest.approx(loss.item(), rel=1e-5)
    named = dict(network.named_parameters())
    for name, array in from_flax(arch, ours).items():
        scale = named[name].grad.abs().max().item()
        np.testing.assert_allclose(array, named[name].grad, rtol=0, atol=1e-4 * scale)


def test_long_rows_whose_logits_come_in_blocks_have_the_same_loss(base):
    _, arch, params = base
    rng = np.random.default_rng(1)
    ids = rng.integers(2, 97, (2, 256)).astype(np.int32)
    mask = (np.arange(256)[None] < np.asarray([[256], [200]])).astype(np.int32)
    loss = jax.jit(partial(completion_loss, arch))
    whole = loss(params, TrainingBatch(ids, mask, mask))
    parts = [
        loss(params, TrainingBatch(ids, mask, mask * (np.arange(256)[None] % 2 == odd)))
        for odd in (0, 1)
    ]
    uneven = loss(params, TrainingBatch(*(np.pad(a, ((0, 0), (0, 5))) for a in (ids, mask, mask))))
    assert whole[1].item() == uneven[1].item() == 255 + 199
    np.testing.assert_allclose(whole[0], parts[0][0] + parts[1][0], rtol=1e-6)
    np.testing.assert_allclose(whole[0], uneven[0], rtol=1e-5)


def test_micro_batches_make_the_step_of_one_batch(base, batches, trained):
    _, arch, params = base
    losses, state = run(arch, params, batches, parts=4)
    np.testing.assert_allclose(losses, trained[0], rtol=0, atol=1e-5)
    assert_close(state.trainable, trained[1].trainable)


def assert_close(ours, theirs):
    for mine, its in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, its, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("constant", lambda o: get_constant_schedule_with_warmup(o, 3)),
        ("linear", lambda o: get_linear_schedule_with_warmup(o, 3, 11)),
        ("cosine", lambda o: get_cosine_schedule_with_warmup(o, 3, 11)),
    ],
)
def test_learning_rates_are_those_of_transformers(name, theirs):
    method = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    schedule = theirs(method)
    expected = []
    for _ in range(11):
        expected.append(schedule.get_last_lr()[0])
        method.step()
        schedule.step()
    rate = learning_rate(0.5, name, 11, 3)
    found = jax.jit(rate)(np.arange(11))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert rate(0).shape == ()


def test_bfloat16_computes_on_master_weights(base, batches, trained):
    _, arch, params = base
    loss = full_loss(arch, dtype=jnp.bfloat16)
    summed, tokens = jax.jit(loss)(params, {}, batches[0], None)
    exact = trained[0][0]
    assert summed.dtype == jnp.float32
    assert (summed / tokens).item() == pytest.approx(exact, rel=2e-2)
    assert (summed / tokens).item() != pytest.approx(exact, rel=1e-6)
    method = optimizer()
    before = jax.eval_shape(lambda tree: init_state(tree, method), params)
    batch = TrainingBatch(*(array[None] for array in batches[0]))
    step = make_step(Objective(loss), method, None)
    after, _ = jax.eval_shape(step, before, {}, batch, jax.random.key(0))
    assert before == after
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {np.dtype(t) for t in ("f4", "i4")}


def test_a_penalty_adds_its_gradient():
    def penalty(trainable, frozen):
        return frozen["strength"] * jnp.sum(jnp.square(trainable["scale"]))

    method = adamw(learning_rate(1e-3, "constant", 1, 0))
    objective = Objective(lambda *_: (jnp.float32(0), jnp.float32(1)), penalty)
    step = make_step(objective, method, None)
    before = np.asarray([1, -2, 2], np.float32)
    state = init_state({"scale": jnp.asarray(before)}, method)
    batch = TrainingBatch(*[np.ones((1, 1, 1), np.int32)] * 3)
    state, metrics = step(state, {"strength": jnp.float32(3)}, batch, jax.random.key(0))
    assert metrics.penalty.item() == pytest.approx(3 * 9)
    assert metrics.gradient_norm.item() == pytest.approx(6 * 3)
    np.testing.assert_allclose(
        state.trainable["scale"] - before, -1e-3 * np.sign(before), rtol=1e-3
    )
