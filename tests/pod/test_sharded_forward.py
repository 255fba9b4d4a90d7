"""The forward over a mesh: the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recall_jax.engine.batching import _sharded_step_bytes
from recall_jax.engine.forward import StreamedForward
from recall_jax.engine.pod import programs
from recall_jax.engine.pod.forward import ShardedForward
from recall_jax.engine.pod.layout import Sharded
from recall_jax.errors import InputError
from recall_jax.methods.weights import Weighing
from recall_jax.models.axes import tensor_axes
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import state_tensors, tensor_shapes
from recall_jax.parallel.mesh import make_mesh, partition_spec
from recall_jax.similarity.compare import Comparison, compare_unit

pytestmark = pytest.mark.eight_devices

# Three heads, a vocabulary and sizes that no mesh of 8 divides.
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 37,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
ARCH = read_architecture(CONFIG)
K = 4
NAMES = [f"model {k}" for k in range(K)]
ROWS = [list(np.random.default_rng(n).integers(0, 37, n)) for n in (3, 15, 9, 16, 6, 5, 12)]
MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"model": 2, "fsdp": 2, "tensor": 2},
]


def model_of(seed):
    draws = np.random.default_rng(seed)
    return {
        name: draws.standard_normal(shape, np.float32) * np.float32(0.1)
        + np.float32(len(shape) == 1)
        for name, shape in tensor_shapes(ARCH).items()
    }


MODELS = [model_of(seed) for seed in range(K)]


def walk(run, models):
    """Pooled means (K, U, n, E)."""
    states, pooled = (), []
    for unit in ARCH.units:
        states, means = run.advance(unit, run.place(unit, models), states, NAMES[: len(models)])
        pooled.append(means)
    return np.stack(pooled, axis=1)


@pytest.fixture(scope="module")
def alone():
    """By the streamed forward on one device."""
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.local_devices()[:1]
        patch.setattr(jax, "local_devices", lambda: devices)
        run = StreamedForward.prepare(ARCH, ROWS, batch_size=8, dtype=jnp.float32, num_models=K)
    return walk(run, MODELS)


def weights(pooled):
    comparison = Comparison()
    return np.stack(
        [
            Weighing().weights(
                compare_unit(jnp.asarray(pooled[:, unit]), comparison)[0],
                unit=unit,
                num_units=len(ARCH.units),
                reference=comparison.reference_index,
            )
            for unit in range(len(ARCH.units))
        ]
    )


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_gives_the_means_and_weights_of_one_device(sizes, alone):
    mesh = make_mesh(sizes)
    run = ShardedForward.prepare(
        ARCH, ROWS, mesh=mesh, batch_size=8, dtype=jnp.float32, num_models=K
    )
    pooled = walk(run, MODELS)
    np.testing.assert_allclose(pooled, alone, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(weights(pooled), weights(alone), rtol=0, atol=1e-6)


def test_a_model_alone_has_the_whole_mesh(alone):
    mesh = make_mesh({"model": 2, "fsdp": 2, "tensor": 2})
    run = ShardedForward.prepare(ARCH, ROWS, mesh=mesh, batch_size=8, dtype=jnp.float32)
    assert run.input_ids[0].sharding.spec[0] == ("model", "data", "fsdp")
    np.testing.assert_allclose(walk(run, MODELS[:1]), alone[:1], rtol=1e-6, atol=1e-6)


def test_models_that_do_not_fill_the_mesh_are_refused():
    mesh = make_mesh({"model": 4, "data": 2})
    with pytest.raises(InputError, match=r"model=4 .* does not divide 6 models"):
        ShardedForward.prepare(ARCH, ROWS, mesh=mesh, batch_size=8, dtype=jnp.float32, num_models=6)


def test_the_model_whose_states_are_not_finite_is_named():
    name = "model.layers.1.mlp.down_proj.weight"
    run = ShardedForward.prepare(
        ARCH, ROWS, mesh=make_mesh(MESHES[0]), batch_size=8, dtype=jnp.float32, num_models=K
    )
    spoilt = MODELS[2][name].copy()
    spoilt[30, 3] = np.nan
    with pytest.raises(InputError, match=rf"model 2: tensor {name} holds NaN"):
        walk(run, [*MODELS[:2], {**MODELS[2], name: spoilt}, MODELS[3]])
    huge = {name: array * np.float32(1e30) for name, array in MODELS[1].items()}
    with pytest.raises(InputError, match=r"model 1: hidden states overflow in unit layers.0"):
        walk(run, [MODELS[0], huge, *MODELS[2:]])


def test_float64_is_computed_with_in_float32(alone):
    run = ShardedForward.prepare(
        ARCH, ROWS, mesh=make_mesh(MESHES[0]), batch_size=8, dtype=jnp.float32
    )
    wide = {name: array.astype(np.float64) for name, array in MODELS[0].items()}
    np.testing.assert_allclose(walk(run, [wide]), alone[:1], rtol=1e-6, atol=1e-6)


@pytest.mark.optimised
def test_what_a_device_holds_is_no_more_than_was_counted():
    mesh = make_mesh(MESHES[2])
    layout, rows, tokens = Sharded(mesh), 8, 256
    arch = read_architecture({**CONFIG, "hidden_size": 48, "intermediate_size": 192})
    split = layout.split(K)
    ids = [list(range(37)) * 6] * rows
    run = layout.forward(arch, ids, batch_size=rows, dtype=jnp.float32, num_models=K)
    (ctx,) = run.contexts
    assert ctx.is_token.shape == (rows, tokens)
    shapes = [tensor_shapes(arch)[name] for name in state_tensors(arch, "layers.0")]
    spread = run.spread
    program = programs.run_block.__wrapped__.lower(
        arch,
        spread,
        [
            jax.ShapeDtypeStruct((1, *shape), jnp.float32, sharding=spread.parameter(cut))
            for shape, cut in zip(shapes, run_cuts(arch, mesh), strict=True)
        ],
        np.int32(tokens),
        jax.ShapeDtypeStruct((1, rows, tokens, 48), jnp.float32, sharding=spread.hidden()),
        ctx,
    ).compile()
    found = program.memory_analysis()
    hidden = rows * tokens * 48 * 4 // split.rows
    counted = (
        _sharded_step_bytes(split, arch, [len(ids[0])], rows, K, 4, 4) // split.sharing_devices
    )
    assert found.argument_size_in_bytes + found.temp_size_in_bytes - hidden <= counted
    assert counted <= 3 * (found.argument_size_in_bytes + found.temp_size_in_bytes)


def run_cuts(arch, mesh):
    shapes = tensor_shapes(arch)
    names = state_tensors(arch, "layers.0")
    return [partition_spec(tensor_axes(arch.family, name), shapes[name], mesh) for name in names]
