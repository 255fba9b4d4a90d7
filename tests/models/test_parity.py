"""Every unit of every family against transformers on torch, in float32, on padded batches."""

import copy
import json

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from recall_jax.models.config import read_architecture
from recall_jax.models.convert import check_tensors, to_flax
from recall_jax.models.forward import block, context, embed, forward, head, logits

pytestmark = pytest.mark.optimised

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
TOKENS = 24
LENGTHS = (TOKENS, 15, 4)


def rope(kind, **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **parameters}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {**YARN, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MIXED = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

CASES = {
    "llama": (LlamaConfig, {}),
    "llama-multi-query": (LlamaConfig, {"num_key_value_heads": 1}),
    "llama-multi-head-tied": (LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads-gelu": (LlamaConfig, {"head_dim": 16, "hidden_act": "gelu_new"}),
    "llama-linear": (LlamaConfig, rope("linear", factor=3.0)),
    "llama-llama3": (LlamaConfig, rope("llama3", **LLAMA3)),
    "llama-yarn": (LlamaConfig, rope("yarn", **YARN)),
    "llama-yarn-options": (
        LlamaConfig,
        rope("yarn", **YARN, beta_fast=4.0, beta_slow=0.5, truncate=False, mscale=0.7,
             mscale_all_dim=0.3),
    ),
    "mistral-full": (MistralConfig, {"sliding_window": None}),
    "mistral-window": (MistralConfig, {"sliding_window": 6, "head_dim": 12}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-tied-gelu": (Qwen2Config, {"tie_word_embeddings": True, "hidden_act": "gelu"}),
    "qwen2-upper-windows": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2-yarn": (Qwen2Config, rope("yarn", **YARN, attention_factor=1.2)),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3-biases-tied": (
        Qwen3Config, {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3-mixed-windows": (Qwen3Config, {"head_dim": 8, **MIXED}),
}  # fmt: skip


def torch_model(config):
    """A random model none of whose parameters, norms and biases included, is at a special value."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def torch_outputs(model, input_ids, attention_mask, **inputs):
    """Outputs of embedding, blocks and final norm, taken by hooks, then the logits."""
    outputs = []
    modules = [model.model.embed_tokens, *model.model.layers, model.model.norm]
    hooks = [m.register_forward_hook(lambda *call: outputs.append(call[2])) for m in modules]
    with torch.no_grad():
        result = model(torch.tensor(input_ids), attention_mask=torch.tensor(attention_mask),
                       **inputs)  # fmt: skip
    for hook in hooks:
        hook.remove()
    return [output.numpy() for output in outputs], result.logits.numpy()


def ours(model, tmp_path):
    """Architecture from the config.json that transformers saves, parameters from its state."""
    model.config.save_pretrained(tmp_path)
    arch = read_architecture(json.loads((tmp_path / "config.json").read_text()))
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    check_tensors(arch, {name: tensor.shape for name, tensor in tensors.items()}, "state_dict")
    return arch, to_flax(arch, tensors)


def padded(side):
    rng = np.random.default_rng(1)
    input_ids = rng.integers(1, TINY["vocab_size"], (len(LENGTHS), TOKENS))
    mask = np.arange(TOKENS)[None] < np.array(LENGTHS)[:, None]
    mask = mask if side == "right" else mask[:, ::-1]
    return np.where(mask, input_ids, 0).astype(np.int32), mask.astype(np.int32)


def pooled(hidden, mask):
    return (np.asarray(hidden) * mask[:, :, None]).sum(1) / mask.sum(1)[:, None]


def relative(found, expected):
    """The largest error of any vector (last axis), as a fraction of its length."""
    difference = np.linalg.norm(np.asarray(found) - expected, axis=-1)
    return (difference / np.linalg.norm(expected, axis=-1)).max()


@pytest.mark.parametrize("case", CASES)
def test_units_and_logits_agree_with_transformers(case, tmp_path):
    kind, changes = CASES[case]
    model = torch_model(kind(**{**TINY, **changes}))
    arch, tree = ours(model, tmp_path)

    @jax.jit
    def run(tree, input_ids, mask):
        states, normed = forward(arch, tree, input_ids, mask)
        return states, logits(arch, tree, normed)

    for side in ("right", "left"):
        input_ids, mask = padded(side)
        expected, expected_logits = torch_outputs(model, input_ids, mask)
        states, scores = run(tree, input_ids, mask)
        assert len(states) == len(arch.units) == len(expected)
        for unit, found, reference in zip(arch.units, states, expected, strict=True):
            token = mask.astype(bool)
            assert relative(np.asarray(found)[token], reference[token]) < 1e-4, (side, unit)
            assert relative(pooled(found, mask), pooled(reference, mask)) < 1e-4, (side, unit)
        assert scores.dtype == np.float32
        assert relative(np.asarray(scores)[token], expected_logits[token]) < 1e-4, side


@pytest.mark.parametrize("side", ["right", "left"])
def test_dynamic_scaling_treats_each_row_as_if_it_were_alone(side, tmp_path):
    trained = {"max_position_embeddings": 10, "num_key_value_heads": 4}
    model = torch_model(LlamaConfig(**{**TINY, **trained, **rope("dynamic", factor=2.0)}))
    arch, tree = ours(model, tmp_path)
    input_ids, mask = padded(side)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)

    assert set(arch.windows) == {None}
    batch = jax.jit(context, static_argnums=0)(arch, mask, positions)
    states = [jax.jit(embed, static_argnums=0)(arch, tree["embed"], input_ids)]
    run_block = jax.jit(block, static_argnums=0)
    for i in range(len(arch.windows)):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"])
        states.append(run_block(arch, params, states[-1], batch, TOKENS))
    states.append(jax.jit(head, static_argnums=0)(arch, tree["head"], states[-1]))

    for row, length in enumerate(LENGTHS):
        token = mask[row].astype(bool)
        alone = input_ids[row][token][None]
        # transformers keeps the frequencies of the longest sequence seen: a fresh copy each time.
        expected, _ = torch_outputs(copy.deepcopy(model), alone, np.ones_like(alone))
        assert alone.shape == (1, length)
        for found, reference in zip(states, expected, strict=True):
            assert relative(np.asarray(found)[row][token], reference[0]) < 1e-4


def test_given_positions_are_those_of_transformers(tmp_path):
    model = torch_model(Qwen2Config(**TINY))
    arch, tree = ours(model, tmp_path)
    input_ids, mask = padded("left")
    positions = 3 + 2 * np.maximum(mask.cumsum(axis=1) - 1, 0)
    expected, _ = torch_outputs(model, input_ids, mask, position_ids=torch.tensor(positions))
    first = jax.tree.map(lambda leaf: leaf[0], tree["layers"])

    @jax.jit
    def run(embedding, first, positions):
        hidden = embed(arch, embedding, input_ids)
        return [
            block(arch, first, hidden, batch, TOKENS)
            for batch in (context(arch, mask, positions), context(arch, mask))
        ]

    found, without = run(tree["embed"], first, positions)
    token = mask.astype(bool)
    assert relative(np.asarray(found)[token], expected[1][token]) < 1e-4
    assert relative(np.asarray(without)[token], expected[1][token]) > 1e-3
