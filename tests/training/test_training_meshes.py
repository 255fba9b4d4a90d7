"""Training on meshes of eight devices against training on one: the same losses and weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from recall_jax.models.architecture import Architecture, Rope
from recall_jax.models.forward import init_params
from recall_jax.models.lora import LoraSpec
from recall_jax.parallel.mesh import (
    make_mesh,
    parameter_shardings,
    parse_mesh,
    put_parameters,
    put_rows,
)
from recall_jax.training.checkpoints import History, TrainingCheckpoints
from recall_jax.training.ewc import fisher_of_batches
from recall_jax.training.lora import init_lora, lora_loss
from recall_jax.training.methods import full_loss
from recall_jax.training.optimizer import adamw, learning_rate
from recall_jax.training.step import Objective, TrainingBatch, init_state, make_step

pytestmark = pytest.mark.eight_devices

STEPS, ROWS, LENGTH, VOCABULARY = 20, 8, 16, 37
MESHES = ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"]

# Tensors of two cut the vocabulary and the three heads of keys unevenly.
ARCH = Architecture(
    family="qwen3",
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=6,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    qkv_bias=True,
    output_bias=False,
    mlp_bias=True,
    qk_norm=True,
    tie_word_embeddings=False,
    rope=Rope(),
    windows=(None, 8),
)
LORA = LoraSpec(r=3, dropout=0.2, target_modules=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def params():
    return jax.device_get(init_params(ARCH, jax.random.key(0)))


@pytest.fixture(scope="module")
def batches():
    """One micro-batch each of right-padded rows of 4 to 16 tokens, all of which count."""
    rng = np.random.default_rng(0)
    is_token = (np.arange(LENGTH)[None] < rng.integers(4, LENGTH + 1, (ROWS, 1))).astype(np.int32)
    ids = rng.integers(2, VOCABULARY, (2, ROWS, LENGTH)).astype(np.int32) * is_token[None]
    return [
        TrainingBatch(*(array[None] for array in (ids[i % 2], is_token, is_token)))
        for i in range(STEPS)
    ]


@pytest.fixture(scope="module")
def alone(params, batches):
    """Losses and last parameters on one device."""
    return run("data=1", params, batches)


def full(mesh):
    return full_loss(ARCH, dtype=jnp.float32, mesh=mesh)


def lora(mesh):
    return lora_loss(ARCH, LORA, mesh=mesh)


KEY = jax.random.key(0)
PROGRAMS = {}


def on(text, trainable, batch, loss=full, frozen=None):
    """(mesh, compiled step, state before the first, frozen tree)."""
    mesh = make_mesh(parse_mesh(text))
    method = adamw(learning_rate(5e-3, "cosine", STEPS, 4), weight_decay=0.1, clip_norm=1.0)
    like = jax.eval_shape(lambda tree: init_state(tree, method), trainable)
    shardings = parameter_shardings(like, mesh)
    state = put_parameters(jax.device_get(init_state(trainable, method)), mesh)
    frozen = put_parameters(frozen or {}, mesh)
    if (text, loss) not in PROGRAMS:
        step = make_step(Objective(loss(mesh)), method, shardings)
        batch = put_rows(batch, mesh, axis=1)
        PROGRAMS[text, loss] = step.lower(state, frozen, batch, KEY).compile()
    return mesh, PROGRAMS[text, loss], state, frozen


def run(text, trainable, batches, loss=full, frozen=None):
    mesh, step, state, frozen = on(text, trainable, batches[0], loss, frozen)
    losses = []
    for batch in batches:
        state, metrics = step(state, frozen, put_rows(batch, mesh, axis=1), KEY)
        losses.append(metrics.loss.item())
    return losses, state


def assert_close(ours, theirs):
    for mine, its in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, its, rtol=0, atol=2e-5)


def assert_lies(array, sharding):
    assert array.sharding.is_equivalent_to(sharding, array.ndim)


@pytest.mark.parametrize(
    "mesh",
    [*(pytest.param(each, marks=pytest.mark.soak) for each in MESHES[:-1]), MESHES[-1]],
)
def test_a_mesh_gives_the_numbers_of_one_device(params, batches, alone, mesh):
    losses, state = run(mesh, params, batches)
    assert alone[0][-1] < 0.98 * alone[0][0]
    np.testing.assert_allclose(losses, alone[0], rtol=0, atol=1e-5)
    assert_close(state.trainable, alone[1].trainable)
    expected = parameter_shardings(params, make_mesh(parse_mesh(mesh)))
    for tree in (state.trainable, state.optimizer_state[1].nu):
        jax.tree.map(assert_lies, tree, expected)


def test_factors_of_an_adapter_are_cut_as_their_layers_are(params, batches):
    start = jax.device_get(init_lora(ARCH, LORA, jax.random.key(1)))
    few, frozen = batches[:6], {"base": params}
    (losses, state), (expected, other) = (
        run(mesh, start, few, lora, frozen) for mesh in (MESHES[-1], "data=1")
    )
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    assert_close(state.trainable, other.trainable)
    own = parameter_shardings(state.trainable, make_mesh(parse_mesh(MESHES[-1])))
    assert [sharding.spec for sharding in own["layers"]["mlp"]["down_proj"].values()] == [
        PartitionSpec(None, "tensor", None),
        PartitionSpec(None, None, "fsdp"),
    ]
    jax.tree.map(assert_lies, state.trainable, own)


def test_fisher_information_is_taken_on_the_mesh_and_cut_as_the_parameters_are(params, batches):
    rows = [TrainingBatch(*(array[0] for array in batch)) for batch in batches[:2]]
    loss = full_loss(ARCH, dtype=jnp.float32)
    found, expected = (
        fisher_of_batches(loss, params, {}, rows, make_mesh(parse_mesh(mesh)))
        for mesh in (MESHES[-1], "data=1")
    )
    for mine, its in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-7)
    jax.tree.map(assert_lies, found, parameter_shardings(params, make_mesh(parse_mesh(MESHES[-1]))))


def test_what_a_step_works_with_is_shared_out(params, batches):
    """Hidden states stay where their rows are; it is the parameters that are gathered."""

    def temporary(text):
        _, step, *_ = on(text, params, batches[0])
        return step.memory_analysis().temp_size_in_bytes

    assert temporary("fsdp=8") < 1.5 / 8 * temporary("data=1")


def test_a_state_is_saved_from_a_mesh_and_loaded_back(params, batches, tmp_path):
    mesh, step, state, frozen = on(MESHES[-1], params, batches[0])
    checkpoints = TrainingCheckpoints(
        tmp_path / "journal", {"settings": {}, "program": {}, "inputs": {}}
    )
    first, second = (put_rows(batch, mesh, axis=1) for batch in batches[:2])
    state, _ = step(state, frozen, first, KEY)
    like = jax.eval_shape(lambda: state)
    checkpoints.save(state, History(losses=[1.0]))
    whole, _ = step(state, frozen, second, KEY)
    found, history = checkpoints.resume(like)
    resumed, _ = step(put_parameters(found, mesh), frozen, second, KEY)
    assert history.losses == [1.0]
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
