"""Metrics against sacrebleu, and against what SQuAD's published script does at the edges."""

import random
import sys

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.errors import InputError
from recall_jax.evaluation import metrics
from recall_jax.evaluation.metrics import (
    bleu,
    exact_match,
    mean_estimate,
    normalise_answer,
    squad_exact_match,
    squad_f1,
)

# What evaluate-v2.0.py does with a prediction and a question's answers: (exact, F1).
CASES = {
    "the same": ("Denver Broncos", ["Denver Broncos"], 1, 1),
    "case": ("DENVER broncos", ["Denver Broncos"], 1, 1),
    "articles": ("the Denver a Broncos", ["Denver Broncos"], 1, 1),
    "articles within words stay": ("theatre", ["atre"], 0, 0),
    "punctuation goes without a space": ("U.S.A.", ["USA"], 1, 1),
    "a hyphen joins words": ("well-known", ["well known"], 0, 0),
    "an article after punctuation is gone": ("(the) end", ["end"], 1, 1),
    "punctuation first, articles then": ("a.n", ["x"], 0, 0),
    "punctuation that makes an article": ("t-h-e cat", ["cat"], 1, 1),
    "only ASCII punctuation": ("«oui»", ["oui"], 0, 0),
    "white space": ("  Denver \t\n Broncos ", ["Denver Broncos"], 1, 1),
    "several references, the best": ("10 February", ["February 10", "10 February"], 1, 1),
    "several references, the best F1": ("blue sky today", ["red", "blue sky"], 0, 0.8),
    "overlap": ("in the city of Paris", ["Paris"], 0, 0.4),
    "words count as often as they come": ("ha ha ha", ["ha"], 0, 0.5),
    "order does not count for F1": ("Broncos Denver", ["Denver Broncos"], 0, 1),
    "no overlap": ("Paris", ["London"], 0, 0),
    "nothing predicted": ("", ["London"], 0, 0),
    "no answer, none predicted": ("", [], 1, 1),
    "no answer, some predicted": ("London", [], 0, 0),
    "no answer, only an article predicted": ("the", [], 1, 1),
    "no answer, only punctuation predicted": ("...", [], 1, 1),
    "a reference that is all article is dropped": ("cat", ["the", "cat"], 1, 1),
    "nothing predicted, one reference of two is empty": ("", ["the", "cat"], 0, 0),
    "all references empty once normalised": ("", ["a", "."], 1, 1),
    "all references empty, some predicted": ("cat", ["a", "."], 0, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_squad_at_its_edges(case):
    prediction, references, exact, f1 = CASES[case]
    assert squad_exact_match(prediction, references) == exact
    assert squad_f1(prediction, references) == pytest.approx(f1, abs=1e-12)


def test_normalised_answers():
    assert normalise_answer("The U.S. a  an-apple, THE") == "us anapple"
    assert normalise_answer("a an the") == ""
    assert normalise_answer("naïve — the ‘word’") == "naïve — ‘word’"


@given(st.text("ab .tTHhe-", max_size=12), st.text("ab .tTHhe-", max_size=12))
def test_squad_s_algebra(first, second):
    assert normalise_answer(normalise_answer(first)) == normalise_answer(first)
    assert squad_f1(first, [second]) == squad_f1(second, [first])
    assert squad_exact_match(first, [second]) <= squad_f1(first, [second]) <= 1


def estimates(names, predictions, references):
    scores = metrics.row_scores(names, predictions, references)
    return metrics.estimates(names, predictions, references, scores)


def test_both_kinds_of_questions_are_counted_apart():
    predictions = ["cat", "", "dog", ""]
    references = [["the cat"], ["fish"], [], []]
    found = estimates(["squad_exact_match", "squad_f1"], predictions, references)
    assert found["squad_exact_match"].value == 50
    assert found["has_answer_squad_exact_match"][::2] == (50, 2)
    assert found["no_answer_squad_f1"][::2] == (50, 2)
    # A question whose answers normalise to nothing has answers all the same.
    found = estimates(["squad_f1"], ["", "x"], [["the"], []])
    assert found["has_answer_squad_f1"][::2] == (100, 1)
    assert list(estimates(["squad_f1"], ["", "x"], [[], []])) == ["squad_f1"]
    assert list(estimates(["exact_match"], ["", "x"], [["y"], ["x"]])) == ["exact_match"]


def test_exact_match_keeps_punctuation_and_articles():
    assert exact_match(" [a [b]]\n", ["[a [b]]"]) == 1
    assert exact_match("[a [b]", ["[a [b]]"]) == 0
    assert exact_match("cat", ["the cat"]) == 0


def test_mean_and_standard_error():
    scores = [1.0, 0.0, 0.0, 0.5]
    found = mean_estimate(scores)
    assert found.value == 37.5
    assert found.standard_error == pytest.approx(100 * np.std(scores, ddof=1) / 2)
    assert found.rows == 4
    assert mean_estimate([1.0]) == (100.0, None, 1)


def _sentences(count, seed):
    rng = random.Random(seed)
    words = ["le", "chat,", "dort.", "l'eau", "3,5", "bon!", "été", "à", "demi-mot", "(oui)"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(count)]


def test_bleu_is_sacrebleu_s():
    references = _sentences(30, 0)
    predictions = [
        a if i % 2 else b
        for i, (a, b) in enumerate(zip(references, _sentences(30, 1), strict=True))
    ]
    found = bleu(predictions, [[reference] for reference in references])
    expected = sacrebleu.corpus_bleu(predictions, [references])
    assert found.value == pytest.approx(expected.score, abs=1e-9)
    metric = sacrebleu.BLEU()
    metric.corpus_score(predictions, [references], n_bootstrap=1)
    resampled = sacrebleu.BLEU().corpus_score(predictions, [references], n_bootstrap=1000)
    # sacrebleu gives the half width of a 95 % interval: about two standard errors
    assert found.standard_error == pytest.approx(resampled._ci / 1.96, rel=0.15)
    assert bleu(predictions, [[reference] for reference in references]) == found


def test_bleu_with_several_references_and_empty_predictions():
    first, second, predictions = _sentences(8, 2), _sentences(8, 3), _sentences(8, 4)
    predictions[3] = ""
    predictions[5] = second[5]
    found = bleu(predictions, list(zip(first, second, strict=True)))
    expected = sacrebleu.corpus_bleu(predictions, [first, second])
    assert found.value == pytest.approx(expected.score, abs=1e-9)
    assert bleu([""], [["chat"]]) == (0.0, None, 1)


def test_bleu_without_sacrebleu_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(InputError, match="pip install sacrebleu"):
        metrics.bleu(["a"], [["a"]])
