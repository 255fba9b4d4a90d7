"""Generation against transformers' own, token by token; what stops a row; what is drawn."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from recall_jax.errors import InputError
from recall_jax.generation import generate as generation
from recall_jax.generation.generate import generate
from recall_jax.generation.sampling import Sampling
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import to_flax
from recall_jax.models.forward import init_params

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
    "pad_token_id": 0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
CONFIGS = {
    # trained on 12 tokens: some prompts are longer, others grow beyond it
    "llama": LlamaConfig(**SIZES, max_position_embeddings=12, rope_parameters=DYNAMIC),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, **WINDOWS),
    "mistral": MistralConfig(**SIZES, head_dim=8, sliding_window=5),
}
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(1, 50, length).tolist() for length in (3, 14, 1, 16, 7, 10, 5)]


def converted(config):
    torch.set_num_threads(1)  # for models this small, more take ten times as long
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval()
    arch = read_architecture(config.to_dict())
    return network, arch, to_flax(arch, {n: t.numpy() for n, t in network.state_dict().items()})


def padded(side):
    """PROMPTS as one batch: ids and mask."""
    length = max(map(len, PROMPTS))
    ids, mask = np.zeros((2, len(PROMPTS), length), np.int32)
    for row, prompt in enumerate(PROMPTS):
        places = slice(len(prompt)) if side == "right" else slice(length - len(prompt), None)
        ids[row, places], mask[row, places] = prompt, 1
    return ids, mask


def theirs(network, ids, mask):
    """What transformers generates from a left-padded batch."""
    tokens = network.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )  # fmt: skip
    return tokens[:, ids.shape[1] :].tolist()


def ours(model, prompts=PROMPTS, new_tokens=NEW_TOKENS, ends=(), batch_size=7, **options):
    _, arch, tree = model
    return generate(
        arch, tree, prompts, max_new_tokens=new_tokens, eos_token_ids=ends, batch_size=batch_size,
        **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mistral():
    return converted(CONFIGS["mistral"])


@pytest.fixture(scope="module")
def expected(mistral):
    return theirs(mistral[0], *padded("left"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_token_is_that_of_transformers(name, mistral):
    model = mistral if name == "mistral" else converted(CONFIGS[name])
    network = model[0]
    if name == "llama":
        # Its frequencies are those of the longest row of a batch: each row in a batch of its own.
        alone = [np.array([prompt]) for prompt in PROMPTS]
        answers = [theirs(copy.deepcopy(network), ids, np.ones_like(ids))[0] for ids in alone]
    else:
        answers = theirs(network, *padded("left"))
    assert len({tuple(tokens) for tokens in answers}) == len(PROMPTS)
    assert ours(model) == answers

    begun = _begun(model, *padded("left"), [])
    assert generation._completions(generation._go_on(*begun, NEW_TOKENS)) == answers


def _begun(model, ids, mask, ends):
    """The arguments of `_go_on` less the last, as `generate` would have them of one batch."""
    keys = generation._row_keys(jax.random.key(0), np.arange(len(ids)))
    params, ends = jax.device_put((model[2], np.asarray(ends, np.int32)))
    choosing = (model[1], Sampling(0.0), params, ends, keys)
    state = generation._begin(*choosing, ids, mask, NEW_TOKENS, jnp.float32)
    return *choosing, state


def test_a_row_stops_before_its_first_end(mistral, expected):
    ends = [expected[0][4], expected[1][0]]
    cut = [
        tokens[: next((i for i, token in enumerate(tokens) if token in ends), NEW_TOKENS)]
        for tokens in expected
    ]
    assert [] in cut
    assert any(0 < len(tokens) < NEW_TOKENS for tokens in cut)
    assert any(len(tokens) == NEW_TOKENS for tokens in cut)
    assert ours(mistral, ends=ends) == cut


@pytest.mark.parametrize("between", [1, 5, 100])
def test_a_row_stops_with_the_first_token_that_the_caller_stops_at(
    between, mistral, expected, monkeypatch
):
    monkeypatch.setattr(generation, "STEPS_BETWEEN_STOPS", between)
    pair = expected[0][5:7]

    def stop(tokens):
        return (
            any(tokens[i : i + 2] == pair for i in range(len(tokens))) or expected[1][0] in tokens
        )

    end = expected[2][3]
    cut = []
    for tokens in expected:
        cut.append([])
        while len(cut[-1]) < NEW_TOKENS and tokens[len(cut[-1])] != end and not stop(cut[-1]):
            cut[-1].append(tokens[len(cut[-1])])
    assert cut[0] == expected[0][:7] and cut[1] == expected[1][:1]
    assert ours(mistral, ends=[end, end], stop=stop) == cut


def test_generation_ends_when_every_row_has(mistral, expected):
    *choosing, state = _begun(mistral, *padded("left"), [expected[0][3]] * 2)
    state = state._replace(done=jnp.arange(len(PROMPTS)) > 0)
    assert int(generation._go_on(*choosing, state, NEW_TOKENS).step) == 4


def test_one_program_for_each_padded_length_whatever_the_weights(mistral):
    network, arch, tree = mistral
    ours(mistral, ends=[0, 1])
    programs = generation._begin._cache_size(), generation._go_on._cache_size()
    other = {**tree, "head": jax.tree.map(lambda leaf: leaf * 2, tree["head"])}
    ours((network, arch, other), PROMPTS[::-1], ends=[2, 3])
    ours((network, arch, other), PROMPTS * 2, ends=[2, 3])
    assert programs == (generation._begin._cache_size(), generation._go_on._cache_size())


def test_logits_that_are_nan_are_no_answer(mistral):
    network, arch, tree = mistral
    embedding = tree["embed"]["embedding"].copy()
    embedding[PROMPTS[3][0]] = np.nan
    with pytest.raises(InputError, match="the model's logits are NaN"):
        ours((network, arch, {**tree, "embed": {"embedding": embedding}}))


def test_no_prompts_no_answers(mistral):
    assert ours(mistral, []) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": [[1], []]}, "prompt 1 .from 0. has no tokens"),
        ({"prompts": [[50]]}, "token id 50, but the model has 50 embeddings"),
        ({"new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"top_p": 0.5}, "temperature above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words, mistral):
    with pytest.raises(InputError, match=words):
        ours(mistral, **options)


def test_what_is_drawn_depends_on_seed_and_place_but_not_on_the_batch(mistral):
    drawn = ours(mistral, temperature=1.0, seed=5)
    alone = [ours(mistral, PROMPTS[:count], temperature=1.0, seed=5)[-1] for count in (1, 2, 5)]
    assert alone == [drawn[0], drawn[1], drawn[4]]
    assert ours(mistral, temperature=1.0, seed=6) != drawn
    same = ours(mistral, PROMPTS[:1] * 7, temperature=1.0, seed=5)
    assert same[0] == drawn[0] and len({tuple(tokens) for tokens in same}) == 7


def test_steps_and_rows_are_drawn_independently():
    """From a model to which all eight tokens are as likely."""
    arch = read_architecture(
        {
            "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 1,
        }
    )  # fmt: skip
    tree = jax.tree.map(np.zeros_like, init_params(arch, jax.random.key(0)))
    rows = np.array(ours((None, arch, tree), [[1]] * 512, 8, batch_size=512, temperature=1.0))
    for first, second in ((rows[:, :-1], rows[:, 1:]), (rows[:-1], rows[1:])):
        pairs = np.bincount((first * 8 + second).ravel(), minlength=64)
        assert stats.chisquare(pairs).pvalue > 0.01
