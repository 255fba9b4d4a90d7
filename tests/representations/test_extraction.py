"""Extraction: the same pooled states from every backend, and never a (U, n, T, E) array."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recall_jax.errors import InputError
from recall_jax.models.config import read_architecture
from recall_jax.models.forward import forward, init_params
from recall_jax.representations.extract import _program, extract
from recall_jax.representations.pooling import masked_mean

pytestmark = pytest.mark.eight_devices

BACKENDS = ("jit", "shard_map", "pmap")
WIDTHS = (4, 6, 3)
PARAMS = {
    "embedding": np.random.default_rng(0).standard_normal((11, 4)).astype(np.float32),
    "kernel": np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32),
}


def apply_fn(params, batch):
    """Three units: of width 4, of width 6, and one that is pooled already, of width 3."""
    hidden = params["embedding"][batch["input_ids"]]
    wide = jnp.tanh(hidden @ params["kernel"])
    return hidden, wide, wide[:, 0, :3]


def batches_of(num_rows, batch_size=8, length=5):
    """Rows in batches of `batch_size`, the last one with what is left."""
    rng = np.random.default_rng(num_rows)
    ids = rng.integers(0, 11, (num_rows, length)).astype(np.int32)
    mask = (np.arange(length)[None] < rng.integers(1, length + 1, (num_rows, 1))).astype(np.int32)
    return [
        {"input_ids": ids[at : at + batch_size], "attention_mask": mask[at : at + batch_size]}
        for at in range(0, num_rows, batch_size)
    ]


def expected_of(batches):
    """Row by row in float64."""
    columns = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            hidden = PARAMS["embedding"].astype(np.float64)[ids]
            wide = np.tanh(hidden @ PARAMS["kernel"].astype(np.float64))
            units = [hidden[mask == 1].mean(0), wide[mask == 1].mean(0), wide[0, :3]]
            columns.append([np.pad(unit, (0, 6 - len(unit))) for unit in units])
    return np.swapaxes(np.asarray(columns), 0, 1)


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 17])
def test_any_number_of_rows_on_any_backend(num_rows):
    batches = batches_of(num_rows)
    expected = expected_of(batches)
    for backend in BACKENDS:
        reps = extract(apply_fn, PARAMS, batches, backend=backend)
        assert isinstance(reps, np.ndarray) and reps.dtype == np.float32
        assert reps.shape == (3, num_rows, 6)
        np.testing.assert_allclose(reps, expected, rtol=0, atol=1e-6)
        # Units narrower than the widest are padded with zeros.
        for unit, width in enumerate(WIDTHS):
            assert not reps[unit, :, width:].any()


def test_batches_of_any_sizes_and_lengths_in_their_order():
    batches = [*batches_of(3, length=4), *batches_of(11, 11), *batches_of(1, length=7)]
    expected = expected_of(batches)
    for backend in BACKENDS:
        reps = extract(apply_fn, PARAMS, iter(batches), backend=backend)
        np.testing.assert_allclose(reps, expected, rtol=0, atol=1e-6)


def test_a_batch_of_any_pytree_with_a_mask_of_its_own():
    def pair_apply(params, batch):
        ids, (_, scale) = batch
        return [params["embedding"][ids] * scale[:, None, None]]

    ids = np.random.default_rng(0).integers(0, 11, (5, 4)).astype(np.int32)
    keep = np.array([[True] * 4] * 3 + [[True, False, False, False]] * 2)
    batch = (ids, (keep, jnp.arange(5, dtype=jnp.float32)))
    hidden = PARAMS["embedding"].astype(np.float64)[ids] * np.arange(5)[:, None, None]
    expected = [hidden[row][keep[row]].mean(axis=0) for row in range(5)]
    for backend in BACKENDS:
        reps = extract(pair_apply, PARAMS, [batch], mask=lambda b: b[1][0], backend=backend)
        np.testing.assert_allclose(reps[0], expected, rtol=0, atol=1e-6)


def test_a_recurrence_from_zeros_runs_on_every_backend():
    def recurrent(params, batch):
        hidden = params["embedding"][batch["input_ids"]]

        def step(state, token):
            state = jnp.tanh(0.5 * state + token)
            return state, state

        zeros = jnp.zeros((hidden.shape[0], 4))
        _, states = jax.lax.scan(step, zeros, jnp.swapaxes(hidden, 0, 1))
        return (jnp.swapaxes(states, 0, 1),)

    reps = [extract(recurrent, PARAMS, batches_of(9), backend=backend) for backend in BACKENDS]
    np.testing.assert_allclose(reps[1], reps[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(reps[2], reps[0], rtol=0, atol=1e-6)


def test_a_mesh_of_ones_own():
    mesh = jax.make_mesh((4, 2), ("rows", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    batches = batches_of(9)
    reps = extract(apply_fn, PARAMS, batches, backend="shard_map", mesh=mesh)
    np.testing.assert_allclose(reps, expected_of(batches), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compilation_serves_all_models_and_an_uneven_last_batch(backend):
    traces = []

    def counted(params, batch):
        traces.append(batch["input_ids"].shape)
        return apply_fn(params, batch)

    for scale in (1.0, 2.0, 3.0):
        params = jax.tree.map(lambda leaf, scale=scale: leaf * np.float32(scale), PARAMS)
        extract(counted, params, batches_of(17), backend=backend)
    assert len(traces) == 1


ARCHITECTURE = {
    "model_type": "qwen2",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def decoder(num_layers):
    """The repository's own decoder, pooled while it scans: (apply_fn, params)."""
    arch = read_architecture({**ARCHITECTURE, "num_hidden_layers": num_layers})

    def run(params, batch):
        pool = partial(masked_mean, attention_mask=batch["attention_mask"])
        return forward(arch, params, **batch, observe=pool)[0]

    return run, jax.eval_shape(partial(init_params, arch), jax.random.key(0))


def plain_layers(num_layers):
    """An apply_fn that returns the whole hidden states of every unit."""

    def run(params, batch):
        states = [params["embedding"][batch["input_ids"]]]
        for kernel in params["kernels"]:
            states.append(states[-1] + jnp.tanh(states[-1] @ kernel))
        return states

    kernels = jax.ShapeDtypeStruct((64, 64), np.float32)
    embedding = jax.ShapeDtypeStruct((32, 64), np.float32)
    return run, {"embedding": embedding, "kernels": [kernels] * num_layers}


def test_the_decoder_on_every_backend():
    run, shapes = decoder(2)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), shapes)
    batches = batches_of(9, length=16)
    reps = [extract(run, params, batches, backend=backend) for backend in BACKENDS]
    assert reps[0].shape == (4, 9, 64) and np.isfinite(reps[0]).all()
    np.testing.assert_allclose(reps[1], reps[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(reps[2], reps[0], rtol=0, atol=1e-6)


@pytest.mark.optimised
@pytest.mark.parametrize("model", [decoder, plain_layers])
def test_hidden_states_of_all_units_are_never_held(model):
    rows, length = 8, 256
    one_unit = rows * length * 64 * 4

    def temporary_bytes(num_layers):
        run, params = model(num_layers)
        tokens = jax.ShapeDtypeStruct((rows, length), np.int32)
        program = _program(run, None, "jit", None).run
        batch = {"input_ids": tokens, "attention_mask": tokens}
        compiled = program.lower(params, batch).compile()
        (out,) = jax.tree.leaves(compiled.out_info)
        assert out.shape == (num_layers + (2 if model is decoder else 1), rows, 64)
        return compiled.memory_analysis().temp_size_in_bytes

    shallow, deep = temporary_bytes(3), temporary_bytes(15)
    # Twelve more layers cost less than the hidden states of one.
    assert deep - shallow < one_unit
    if model is plain_layers:
        assert deep < 6 * one_unit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "no batch to extract from"),
        ({"backend": "cuda"}, "unknown backend 'cuda': use 'jit', 'shard_map' or 'pmap'"),
        ({"batches": [{"input_ids": np.zeros((2, 3), np.int32)}]}, "need a mask"),
        (
            {"batches": [{"input_ids": np.zeros((2, 3)), "attention_mask": np.zeros((3, 3))}]},
            "must all start with the same number of rows",
        ),
        ({"batches": [{"input_ids": np.int32(3)}]}, "must all start with the same number of rows"),
        ({"batches": [()]}, "must all start with the same number of rows"),
        ({"apply_fn": lambda params, batch: ()}, "apply_fn returned no units"),
        ({"apply_fn": lambda params, batch: [batch["input_ids"][0]]}, r"shape \(5,\); return"),
    ],
)
def test_what_does_not_fit(arguments, message):
    given = {"apply_fn": apply_fn, "params": PARAMS, "batches": batches_of(3), **arguments}
    with pytest.raises(InputError, match=message):
        extract(**given)


def test_a_mesh_is_not_for_pmap():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(InputError, match="mesh= goes with backend='shard_map' or 'jit'"):
        extract(apply_fn, PARAMS, batches_of(3), backend="pmap", mesh=mesh)


def test_parameters_may_be_spread_over_a_mesh():
    devices = jax.devices()[:2]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    params = jax.device_put(PARAMS, jax.NamedSharding(mesh, jax.P(None, "x")))
    reps = extract(apply_fn, params, batches_of(3), mesh=mesh)
    np.testing.assert_allclose(reps, extract(apply_fn, PARAMS, batches_of(3)), rtol=1e-5, atol=1e-6)


def test_low_precision_hidden_states_are_pooled_in_float32():
    def low(params, batch):
        return (params["embedding"][batch["input_ids"]].astype(jnp.bfloat16),)

    batches = batches_of(4)
    reps = extract(low, PARAMS, batches)
    chex.assert_shape(reps, (1, 4, 4))
    rounded = np.asarray(jnp.asarray(PARAMS["embedding"], jnp.bfloat16)).astype(np.float64)
    rows = zip(batches[0]["input_ids"], batches[0]["attention_mask"], strict=True)
    expected = [rounded[ids][mask == 1].mean(axis=0) for ids, mask in rows]
    np.testing.assert_allclose(reps[0], expected, rtol=0, atol=1e-6)
