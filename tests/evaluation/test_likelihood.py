"""Likelihoods against log-softmax of transformers' logits, one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from recall_jax.errors import InputError
from recall_jax.evaluation import likelihood
from recall_jax.evaluation.likelihood import (
    log_likelihoods,
    rolling_windows,
    token_nll,
)
from recall_jax.evaluation.metrics import text_estimates
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import to_flax

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
CONFIGS = {
    "dynamic": LlamaConfig(**SIZES, max_position_embeddings=16, rope_parameters=DYNAMIC),
    "window": MistralConfig(**SIZES, head_dim=8, sliding_window=5, tie_word_embeddings=True),
}
RNG = np.random.default_rng(0)
CONTEXTS = [RNG.integers(1, 97, n).tolist() for n in (3, 1, 20, 9, 30, 2, 4, 8)]
CONTINUATIONS = [RNG.integers(1, 97, n).tolist() for n in (28, 1, 12, 22, 2, 30, 0, 24)]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    torch.set_num_threads(1)  # for models this small, more take ten times as long
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    arch = read_architecture(network.config.to_dict())
    tree = to_flax(arch, {n: t.numpy() for n, t in network.state_dict().items()})
    return network, arch, tree


def theirs(network, context, continuation):
    """ln p of every token of the continuation, and whether all are the likeliest."""
    row = torch.tensor([[*context, *continuation]])
    # transformers keeps the frequencies of the longest row that it has seen
    network.model.rotary_emb = type(network.model.rotary_emb)(network.config)
    with torch.no_grad():
        scores = network(row[:, :-1]).logits[0, len(context) - 1 :].double()
    targets = row[0, len(context) :]
    log_p = torch.log_softmax(scores, -1).gather(1, targets[:, None])[:, 0].numpy()
    return log_p, bool((scores.argmax(-1) == targets).all())


def likeliest(network, context, count=5):
    """Continuation that greedy decoding gives."""
    row = list(context)
    for _ in range(count):
        with torch.no_grad():
            row.append(int(network(torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(context) :]


def test_sums_are_those_of_transformers(model):
    network, arch, tree = model
    greedy = [likeliest(network, context) for context in CONTEXTS[:2]]
    contexts = [*CONTEXTS, *CONTEXTS[:2], CONTEXTS[0]]
    continuations = [*CONTINUATIONS, *greedy, [*greedy[0][:4], (greedy[0][4] + 1) % 97]]
    pairs = list(zip(contexts, continuations, strict=True))
    expected = [theirs(network, *pair) if pair[1] else (np.zeros(0), True) for pair in pairs]
    sums, is_greedy, num_tokens = log_likelihoods(arch, tree, contexts, continuations, batch_size=6)
    np.testing.assert_allclose(sums, [log_p.sum() for log_p, _ in expected], atol=1e-4)
    assert is_greedy.tolist() == [greedily for _, greedily in expected]
    assert is_greedy.tolist()[-5:] == [True, False, True, True, False]
    assert num_tokens.tolist() == [len(rest) for rest in continuations]


def test_no_more_logits_exist_than_of_some_tokens(model):
    _, arch, tree = model
    ids, wanted = jnp.zeros((8, 64), jnp.int32), jnp.zeros(512, jnp.int32)
    program = likelihood._scores.lower(arch, jnp.float32, tree, ids, ids, wanted, wanted).as_text()
    assert "1x128x97xf32" in program
    assert "8x64x97" not in program and "512x97" not in program


def test_nothing_stands_before_the_first_token_of_an_empty_context(model):
    _, arch, tree = model
    with pytest.raises(InputError, match=r"context 1 .* has no tokens"):
        log_likelihoods(arch, tree, [[1], []], [[2], [3]], batch_size=2)
    with pytest.raises(InputError, match="token id 97"):
        log_likelihoods(arch, tree, [[1]], [[97]], batch_size=2)


def test_windows_are_those_of_the_harness():
    """The example in the documentation of its `loglikelihood_rolling`."""
    bos = -1
    assert rolling_windows([bos, *range(10)], 4) == [
        ([bos], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    assert rolling_windows([bos, 0, 1], 4) == [([bos], [0, 1])]
    assert rolling_windows([bos], 4) == []


def test_long_texts_are_counted_window_by_window(model):
    network, arch, tree = model
    texts = [RNG.integers(1, 97, n).tolist() for n in (40, 14, 1, 15)]
    for prefix in (5, None):
        nll, count = token_nll(
            arch, tree, texts, max_length=14, prefix_token_id=prefix, batch_size=6
        )
        for text, mine, tokens in zip(texts, nll, count, strict=True):
            whole = text if prefix is None else [prefix, *text]
            parts = [theirs(network, *pair)[0] for pair in rolling_windows(whole, 14)]
            assert tokens == len(whole) - 1 == sum(map(len, parts))
            assert mine == pytest.approx(-sum(part.sum() for part in parts), abs=1e-4)


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary(model):
    _, arch, tree = model
    blind = jax.tree.map(np.zeros_like, tree)
    nll, count = token_nll(arch, blind, CONTEXTS, max_length=14, prefix_token_id=0, batch_size=6)
    assert text_estimates(nll, count, count)["perplexity"].value == pytest.approx(97)
