"""What LoRA is asked for, its first weights, and its dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from recall_jax.errors import InputError
from recall_jax.models.config import read_architecture
from recall_jax.models.decoder import Linear
from recall_jax.models.forward import (
    attention_windows,
    block,
    context,
    embed,
    forward,
    init_params,
)
from recall_jax.models.lora import LoraSpec, adapted_modules
from recall_jax.training.lora import fold, init_lora

ARCH = read_architecture(
    {
        "model_type": "llama",
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
)
SHARE = 0.25


def test_the_defaults_are_those_of_the_paper_and_rslora_divides_by_the_root():
    spec = LoraSpec()
    assert (spec.r, spec.alpha, spec.dropout) == (8, 32.0, 0.1)
    assert spec.scale == 4.0
    assert LoraSpec(r=16, alpha=32.0, use_rslora=True).scale == 8.0


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("v_proj", "q_proj"), ["self_attn/q_proj", "self_attn/v_proj"]),
        (("mlp.up_proj",), ["mlp/up_proj"]),
        (("o_proj", "self_attn.o_proj"), ["self_attn/o_proj"]),
    ],
)
def test_targets_fit_names_as_in_peft(targets, expected):
    assert list(adapted_modules(ARCH, LoraSpec(target_modules=targets))) == expected
    everything = adapted_modules(ARCH, LoraSpec(target_modules=("all-linear",)))
    assert len(everything) == 7
    assert everything["mlp/gate_proj"] == "mlp.gate_proj"


@pytest.mark.parametrize(
    "name", ["qproj", "proj", "lm_head", "input_layernorm", "embed_tokens", ""]
)
def test_modules_that_do_not_exist_are_named(name):
    spec = LoraSpec(target_modules=("all-linear", name))
    with pytest.raises(InputError, match=f"no linear layer {name!r}; .* gate_proj") as error:
        init_lora(ARCH, spec, jax.random.key(0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"r": 0},
        {"r": 2.0},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"target_modules": ()},
        {"target_modules": "all-linear"},
    ],
)
def test_values_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"LoRA: {name} "):
        LoraSpec(**wrong)


def test_factors_begin_as_in_peft():
    spec = LoraSpec(r=6, target_modules=("q_proj", "down_proj"))
    layers = init_lora(ARCH, spec, jax.random.key(0))["layers"]
    assert list(layers) == ["self_attn", "mlp"]
    q, down = layers["self_attn"]["q_proj"], layers["mlp"]["down_proj"]
    assert q["a"].shape == (2, 16, 6)
    assert q["b"].shape == (2, 6, 16)
    assert down["a"].shape == (2, 24, 6)
    for factors in (q, down):
        assert not factors["b"].any()
        bound = 1 / np.sqrt(factors["a"].shape[1])
        assert 0.9 * bound < jnp.abs(factors["a"]).max() <= bound
        assert_allclose(factors["a"].std(), bound / np.sqrt(3), rtol=0.15)
    assert not np.array_equal(q["a"][0], q["a"][1])


def test_folding_rounds_once():
    params = init_params(ARCH, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    spec = LoraSpec(target_modules=("up_proj",))
    lora = jax.tree.map(jnp.ones_like, init_lora(ARCH, spec, jax.random.key(0)))
    folded = fold(params, lora, spec)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    expected = (np.asarray(kernel, np.float32) + np.float32(4 * 8)).astype(jnp.bfloat16)
    assert_array_equal(folded["layers"]["mlp"]["up_proj"]["kernel"], expected)
    folded["layers"]["mlp"]["up_proj"]["kernel"] = kernel
    jax.tree.map(assert_array_equal, folded, params)


def test_dropout_hides_a_share_of_the_inputs_and_keeps_their_mean():
    """With W = 0 and A = B = 1 the layer's output is what is left of its inputs."""
    spec = LoraSpec(r=8, alpha=8.0, dropout=SHARE)
    eye = jnp.eye(8)
    variables = {"params": {"kernel": jnp.zeros((8, 8))}, "lora": {"a": eye, "b": eye}}
    layer = Linear(8, False, lora=spec)
    inputs = jnp.ones((4000, 8))

    def left(key):
        return np.asarray(layer.apply(variables, inputs, rngs={"dropout": key}))

    one, other = left(jax.random.key(0)), left(jax.random.key(1))
    assert_allclose(np.unique(one), [0, 1 / (1 - SHARE)], rtol=1e-6)
    deviation = np.sqrt(SHARE / (1 - SHARE) / one.size)
    assert abs(one.mean() - 1) < 4 * deviation
    assert_array_equal(one, left(jax.random.key(0)))
    assert abs(np.mean((one == 0) & (other == 0)) - SHARE**2) < 0.01  # independent
    assert_array_equal(layer.apply(variables, inputs), inputs)


def test_every_layer_drops_by_a_key_of_its_own():
    spec = LoraSpec(dropout=0.5)
    params = init_params(ARCH, jax.random.key(0))
    lora = jax.tree.map(lambda leaf: leaf + 0.1, init_lora(ARCH, spec, jax.random.key(1)))
    ids = np.arange(10, dtype=np.int32).reshape(2, 5)
    mask = np.ones_like(ids)

    @jax.jit
    def states(key):
        return forward(ARCH, params, ids, mask, lora=lora, lora_spec=spec, dropout_key=key)[0]

    @jax.jit
    def alone(i, hidden, window, key):
        layer, factors = jax.tree.map(lambda leaf: leaf[i], (params["layers"], lora["layers"]))
        adapter = {"lora": factors, "lora_spec": spec, "dropout_key": key}
        return block(ARCH, layer, hidden, context(ARCH, mask), window, **adapter)

    dropped = states(jax.random.key(2))
    keys = jax.random.split(jax.random.key(2), ARCH.num_hidden_layers)
    hidden = embed(ARCH, params["embed"], ids)
    for i, window in enumerate(attention_windows(ARCH)):
        hidden = alone(i, hidden, window, keys[i])
        assert_allclose(dropped[i + 1], hidden, rtol=0, atol=1e-6)
    assert np.abs(states(jax.random.key(3))[-1] - dropped[-1]).max() > 1e-3
