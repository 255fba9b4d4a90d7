"""Frequencies of every kind against transformers, over the range of parameters in use."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from recall_jax.models.config import read_architecture
from recall_jax.models.rope import inverse_frequencies

THETAS = st.sampled_from([1e4, 5e5, 1e6])
FACTORS = st.floats(1.0, 64.0)
TRAINED = st.sampled_from([64, 2048, 8192, 32768])


def check(rope, length=1, max_position_embeddings=131_072, head_dim=128):
    config = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=max_position_embeddings, rope_parameters=rope
    )
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, seq_len=torch.tensor(length))
    arch = read_architecture(config.to_dict())
    found = inverse_frequencies(arch.rope, arch.head_dim, np.array([length]))
    assert found.dtype == np.float32 and found.shape == (1, head_dim // 2)
    np.testing.assert_allclose(found[0], expected.numpy(), rtol=2e-6)
    np.testing.assert_allclose(arch.rope.attention_factor, factor, rtol=1e-12)


@given(theta=THETAS, factor=FACTORS, head_dim=st.sampled_from([8, 64, 80, 128]))
def test_linear(theta, factor, head_dim):
    rope = {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    check(rope, head_dim=head_dim)


@given(theta=THETAS, factor=FACTORS, length=st.integers(1, 20_000))
def test_dynamic(theta, factor, length):
    rope = {"rope_type": "dynamic", "rope_theta": theta, "factor": factor}
    check(rope, length=length, max_position_embeddings=4096)


@given(theta=THETAS, factor=FACTORS, trained=TRAINED, low=st.floats(0.5, 2), gap=st.floats(0.5, 8))
def test_llama3(theta, factor, trained, low, gap):
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor}
    rope |= {"original_max_position_embeddings": trained}
    check(rope | {"low_freq_factor": low, "high_freq_factor": low + gap})


@given(
    theta=THETAS,
    factor=FACTORS,
    trained=TRAINED,
    options=st.fixed_dictionaries(
        {},
        optional={
            "beta_fast": st.floats(8, 64),
            "beta_slow": st.floats(0.5, 4),
            "truncate": st.booleans(),
            "mscale": st.floats(0.1, 2),
            "mscale_all_dim": st.floats(0.1, 2),
            "attention_factor": st.floats(0.5, 2),
        },
    ),
)
def test_yarn(theta, factor, trained, options):
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": factor}
    check(rope | {"original_max_position_embeddings": trained} | options)
