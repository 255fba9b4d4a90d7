"""The forward over a mesh: the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recall_jax.engine.forward import StreamedForward
from recall_jax.merging.weights import Weighing
from recall_jax.mesh import make_mesh
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import tensor_shapes
from recall_jax.pod.forward import ShardedForward
from recall_jax.similarity.compare import Comparison, compare_unit

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
        run = StreamedForward.of(ARCH, ROWS, batch_size=8, dtype=jnp.float32, num_models=K)
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
    run = ShardedForward.of(ARCH, ROWS, mesh=mesh, batch_size=8, dtype=jnp.float32, num_models=K)
    pooled = walk(run, MODELS)
    np.testing.assert_allclose(pooled, alone, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(weights(pooled), weights(alone), rtol=0, atol=1e-6)
