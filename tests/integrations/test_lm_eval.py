"""The adapter for lm-evaluation-harness: against its own `hf` model where the harness is installed,
and with a stand-in for its base class and requests where it is not."""

import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recall_jax.errors import InputError
from recall_jax.experiments.demo.material import BASE, CHECKPOINTS

MODEL = str(CHECKPOINTS / BASE)
MAX_LENGTH = 24
INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed")
PAIRS = [("reverse abcd=", "dcba"), ("sort dcba=", "abdc"), ("shift " + "abcd" * 8, "=x")]
TEXTS = ["reverse abcd=dcba", "x" * 60, "a"]
QUESTIONS = [
    ("reverse abcd=", {"until": ["\n"], "max_gen_toks": 10}),
    ("sort dcbaz=", {"until": ["c"], "max_gen_toks": 10}),
    ("shift abcd=", {"until": [], "max_new_tokens": 10, "do_sample": False, "temperature": 0.0}),
    ("swap abcdef=", {"until": "<|endoftext|>", "max_gen_toks": 10, "num_beams": 1}),
    ("swap " + "abc" * 20, {"until": ["\n"], "max_gen_toks": 10}),
]


@dataclass
class Request:
    """As `lm_eval.api.instance.Instance`."""

    args: tuple


class StandIn:
    """What `TemplateLM` sets up for its subclasses."""

    def __init__(self):
        self.cache_hook = SimpleNamespace(add_partial=lambda *entry: None)


def requests(arguments):
    return [Request(each if isinstance(each, tuple) else (each,)) for each in arguments]


@pytest.fixture(scope="module")
def lm():
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
                patch.setitem(sys.modules, name, ModuleType(name))
            sys.modules["lm_eval.api.model"].TemplateLM = StandIn
        from recall_jax.integrations.lm_eval import RecallLM

        patch.delitem(sys.modules, "recall_jax.integrations.lm_eval")
        yield RecallLM(MODEL, batch_size=5, max_length=MAX_LENGTH)


@pytest.fixture
def partial(lm, monkeypatch):
    """What the adapter gives to the harness's cache."""
    entries = []
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda *entry: entries.append(entry))
    return entries


@pytest.fixture(scope="module")
def network():
    torch.set_num_threads(1)  # for models this small, more take ten times as long
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def scored(network, context, continuation):
    with torch.no_grad():
        scores = network(torch.tensor([[*context, *continuation][:-1]])).logits[0]
    scores, targets = scores[len(context) - 1 :], torch.tensor(continuation)
    log_p = torch.log_softmax(scores, -1).gather(1, targets[:, None])
    return float(log_p.sum()), bool((scores.argmax(-1) == targets).all())


def test_pairs_are_scored_with_the_context_that_fits(lm, network, tokenizer, partial):
    pairs = [[tokenizer.encode(text) for text in pair] for pair in PAIRS]
    answers = lm._loglikelihood_tokens([(t, *p) for t, p in zip(PAIRS, pairs, strict=True)])
    expected = [scored(network, (c + d)[-MAX_LENGTH - 1 :][: -len(d)], d) for c, d in pairs]
    assert len(pairs[2][0]) > MAX_LENGTH
    for (mine, greedy), (its, its_greedy) in zip(answers, expected, strict=True):
        assert mine == pytest.approx(its, abs=1e-4) and greedy is its_greedy
    assert partial == [("loglikelihood", *pair) for pair in zip(PAIRS, answers, strict=True)]
    with pytest.raises(InputError, match="a continuation has 25 tokens"):
        lm._loglikelihood_tokens([(("", ""), [1], [1] * 25)])


def test_texts_are_scored_whole(lm, network, tokenizer, partial):
    answers = lm.loglikelihood_rolling(requests(TEXTS))
    end = tokenizer.eos_token_id
    x = tokenizer.encode("x")
    parts = [
        [([end], tokenizer.encode(TEXTS[0]))],
        [([end], x * 24), (x, x * 24), (x * 13, x * 12)],
        [([end], tokenizer.encode("a"))],
    ]
    expected = [sum(scored(network, *pair)[0] for pair in pairs) for pairs in parts]
    np.testing.assert_allclose(answers, expected, atol=1e-4)
    assert partial[0] == ("loglikelihood_rolling", (TEXTS[0],), answers[0])


def test_texts_go_on_until_they_are_told_to_stop(lm, network, tokenizer, partial):
    answers = lm.generate_until(requests(QUESTIONS))
    for (context, arguments), answer in zip(QUESTIONS, answers, strict=True):
        most = arguments.get("max_gen_toks", 10)
        prompt = torch.tensor([tokenizer.encode(context)[most - MAX_LENGTH :]])
        tokens = network.generate(prompt, max_new_tokens=most, do_sample=False)[0]
        text = tokenizer.decode(tokens[prompt.shape[1] :], skip_special_tokens=True)
        assert answer == text.split("c" if context.startswith("sort") else "\n")[0]
    assert {entry[2] for entry in partial} == set(answers)


def test_a_special_token_stops_by_its_id(lm, tokenizer, monkeypatch):
    vocabulary = {"<stop>": tokenizer.encode("c")[0]}
    monkeypatch.setattr(lm.tokenizer, "get_added_vocab", lambda: vocabulary)
    asked = ("reverse abcd=", {"until": ["<stop>"], "max_gen_toks": 10})
    assert lm.generate_until(requests([asked])) == ["d"]


def test_samples_differ_from_place_to_place_and_not_from_run_to_run(lm):
    hot = {"until": [], "max_gen_toks": 10, "do_sample": True, "temperature": 9.0, "top_k": 0}
    asked = requests([("reverse abcd=", hot)] * 5)
    drawn = lm.generate_until(asked)
    assert len(set(drawn)) == 5
    assert lm.generate_until(asked) == drawn
    cold = {"until": [], "max_gen_toks": 10, "do_sample": False, "temperature": 2.0, "top_k": 7}
    assert lm.generate_until(requests([("reverse abcd=", cold)] * 2)) == ["dcba"] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_beams": 10}, "num_beams is not supported"),
        ({"max_gen_toks": MAX_LENGTH}, "24 new tokens leave no room"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments, words, lm):
    with pytest.raises(InputError, match=words):
        lm.generate_until(requests([("sort ba=", arguments)]))


def test_without_the_harness_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "recall_jax.integrations.lm_eval", raising=False)
    with pytest.raises(InputError, match="pip install lm_eval"):
        importlib.import_module("recall_jax.integrations.lm_eval")


@needs_harness
def test_answers_are_those_of_the_harness_s_own_model(lm):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(MODEL, device="cpu", dtype="float32", batch_size=4, max_length=MAX_LENGTH)
    asked = requests([*PAIRS, ("", "abc"), ("sort dcba= ", "abcd")])
    expected = theirs.loglikelihood(asked)
    for mine, its in zip(lm.loglikelihood(asked), expected, strict=True):
        assert mine == (pytest.approx(its[0], abs=1e-4), its[1])
    texts = requests(TEXTS)
    rolled = lm.loglikelihood_rolling(texts)
    assert rolled == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-4)
    assert lm.generate_until(requests(QUESTIONS)) == theirs.generate_until(requests(QUESTIONS))
