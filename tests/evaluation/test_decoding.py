"""Greedy decoding against transformers' own, token by token."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from recall_jax.evaluation import decoding
from recall_jax.evaluation.decoding import greedy_decode
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import to_flax

NEW_TOKENS = 12
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # so that tokens vary and no two are nearly as likely
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
NETWORKS = {
    "dynamic rope": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, max_position_embeddings=64, rope_parameters=ROPE),
    ),
    "sliding window": (
        MistralForCausalLM,
        MistralConfig(**SIZES, head_dim=8, sliding_window=5, tie_word_embeddings=True),
    ),
}
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(1, 50, length).tolist() for length in (3, 21, 1, 16, 7, 30, 5)]


@pytest.fixture(scope="module", params=NETWORKS)
def model(request):
    """(architecture, tree, what transformers says after each prompt)"""
    network_class, config = NETWORKS[request.param]
    torch.manual_seed(0)
    network = network_class(config).eval()
    arch = read_architecture(config.to_dict())
    tree = to_flax(arch, {name: t.numpy() for name, t in network.state_dict().items()})
    expected = [
        network.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    return arch, tree, expected


def test_every_token_is_that_of_transformers(model):
    arch, tree, expected = model
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    assert greedy_decode(arch, tree, PROMPTS, NEW_TOKENS, [], 4) == expected


def test_a_row_stops_before_its_first_end(model):
    arch, tree, expected = model
    ends = [expected[0][4], expected[1][0]]
    cut = [
        tokens[: next((i for i, token in enumerate(tokens) if token in ends), NEW_TOKENS)]
        for tokens in expected
    ]
    assert [] in cut
    assert any(0 < len(tokens) < NEW_TOKENS for tokens in cut)
    assert any(len(tokens) == NEW_TOKENS for tokens in cut)
    assert greedy_decode(arch, tree, PROMPTS, NEW_TOKENS, ends, 4) == cut


def test_one_program_for_each_padded_length_whatever_the_weights(model):
    arch, tree, _ = model
    greedy_decode(arch, tree, PROMPTS, NEW_TOKENS, [0, 1], 4)
    programs = decoding._decode._cache_size()
    other = {**tree, "head": {"norm": {"scale": tree["head"]["norm"]["scale"] * 2}}}
    other["head"] = {**tree["head"], **other["head"]}
    greedy_decode(arch, other, PROMPTS[::-1], NEW_TOKENS, [2, 3], 4)
    greedy_decode(arch, other, PROMPTS * 2, NEW_TOKENS, [2, 3], 4)
    assert decoding._decode._cache_size() == programs


def test_no_prompts_no_answers(model):
    arch, tree, _ = model
    assert greedy_decode(arch, tree, [], NEW_TOKENS, [0], 4) == []
