"""Metrics of answers, all on the scale from 0 to 100, and of texts; each with its standard error.

A metric that is a mean over rows has the standard error of the mean; BLEU, which is of the
corpus as a whole, that of its bootstrap.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from recall_jax.errors import InputError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_RESAMPLES = 1000
BLEU = "bleu"
OF_TEXTS = ("perplexity", "bits_per_byte")
"""Metrics of texts, which less is better of and which have no upper end."""


class Estimate(NamedTuple):
    """A metric over `rows` rows; no standard error of a single one."""

    value: float
    standard_error: float | None
    rows: int


def mean_estimate(scores: ArrayLike) -> Estimate:
    """100 times the mean of scores (n,) in [0, 1]; standard error s / sqrt(n), s with n - 1."""
    values = 100 * np.asarray(scores, np.float64)
    if len(values) < 2:
        return Estimate(float(values.mean()), None, len(values))
    error = values.std(ddof=1) / np.sqrt(len(values))
    return Estimate(float(values.mean()), float(error), len(values))


def text_estimates(nats: ArrayLike, tokens: ArrayLike, num_bytes: ArrayLike) -> dict[str, Estimate]:
    """Of n texts with their negative log-likelihoods, tokens and UTF-8 bytes, (n,) each.

    perplexity is exp(sum nats / sum tokens); bits_per_byte, sum nats / (ln 2 · sum num_bytes), can
    be compared between tokenizers. The first one's standard error is the value's times that of its
    logarithm; both stop at the largest number there is.
    """
    surprise, count, size = (np.asarray(each, np.float64) for each in (nats, tokens, num_bytes))
    per_token, per_byte = _ratio(surprise, count), _ratio(surprise / np.log(2), size)
    largest = float(np.finfo(np.float64).max)
    with np.errstate(over="ignore"):
        value = min(float(np.exp(per_token.value)), largest)
    error = per_token.standard_error
    error = None if error is None else min(value * error, largest)
    perplexity = Estimate(value, error, per_token.rows)
    return dict(zip(OF_TEXTS, (perplexity, per_byte), strict=True))


def _ratio(above: np.ndarray, below: np.ndarray) -> Estimate:
    """sum above / sum below, and its standard error for a sample of rows (Cochran 1977, 2.46)."""
    rows, value = len(above), above.sum() / below.sum()
    if rows < 2:
        return Estimate(float(value), None, rows)
    squares = np.sum((above - value * below) ** 2)
    error = np.sqrt(squares * rows / (rows - 1)) / below.sum()
    return Estimate(float(value), float(error), rows)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the answer is one of `references` to the letter, white space at the ends aside."""
    return float(prediction.strip() in [reference.strip() for reference in references])


def normalise_answer(text: str) -> str:
    """An answer as SQuAD compares it.

    Lower case, ASCII punctuation removed, then the words a, an and the; words one space apart.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_exact_match(prediction: str, references: Sequence[str]) -> float:
    """SQuAD 2.0's exact match (Rajpurkar et al. 2018): 1 if any reference normalises alike.

    A question without references has no answer, and the right prediction is empty. So it is too
    where every reference normalises to nothing.
    """
    normalised = normalise_answer(prediction)
    return float(any(normalised == reference for reference in _normalised(references)))


def squad_f1(prediction: str, references: Sequence[str]) -> float:
    """SQuAD 2.0's F1 of the words of normalised answers, counted as bags; the best reference's.

    Where either is empty, 1 if both are.
    """
    normalised = normalise_answer(prediction)
    return max(_f1(normalised.split(), reference.split()) for reference in _normalised(references))


def _normalised(references: Sequence[str]) -> list[str]:
    return list(filter(None, map(normalise_answer, references))) or [""]


def _f1(words: Sequence[str], reference: Sequence[str]) -> float:
    if not words or not reference:
        return float(words == reference)
    common = (Counter(words) & Counter(reference)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(words), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Estimate:
    """Corpus BLEU by sacrebleu's defaults: 13a tokens, up to 4-grams, exponential smoothing.

    `references` are those of each prediction, one or more. The standard error is the standard
    deviation over 1000 bootstrap samples of the rows (Koehn 2004), drawn by a fixed seed. Raises
    InputError where sacrebleu is not installed.
    """
    metric = _sacrebleu()
    rows = [
        metric.sentence_score(prediction, list(mine))
        for prediction, mine in zip(predictions, references, strict=True)
    ]
    counts = np.asarray([[*r.counts, *r.totals, r.sys_len, r.ref_len] for r in rows], np.int64)

    def score(sums: np.ndarray) -> float:
        order = metric.max_ngram_order
        correct, total, (sys_len, ref_len) = np.split(sums, (order, 2 * order))
        result = metric.compute_bleu(
            correct.tolist(), total.tolist(), int(sys_len), int(ref_len), smooth_method="exp"
        )
        return float(result.score)

    value = score(counts.sum(axis=0))
    if len(rows) < 2:
        return Estimate(value, None, len(rows))
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(rows), size=len(rows)) for _ in range(_RESAMPLES))
    samples = [score(counts[draw].sum(axis=0)) for draw in draws]
    return Estimate(value, float(np.std(samples, ddof=1)), len(rows))


def _sacrebleu() -> Any:
    # imported only when used: most tasks need none of it
    try:
        import sacrebleu
    except ImportError as error:
        raise InputError("BLEU needs sacrebleu: pip install sacrebleu") from error
    return sacrebleu.BLEU(effective_order=True)  # which silences its advice for single rows


MEANS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    metric.__name__: metric for metric in (exact_match, squad_exact_match, squad_f1)
}
"""Metrics that are means of a score of each row, by name."""
UNANSWERABLE = ("squad_exact_match", "squad_f1")
"""Those that take a question without references, which an empty prediction answers."""


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise InputError if a metric needs what is not installed."""
    if BLEU in metrics:
        _sacrebleu()


def row_scores(
    metrics: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[dict[str, float]]:
    """The scores in [0, 1] of each prediction by those of `metrics` that are means over rows."""
    rows = zip(predictions, references, strict=True)
    return [{name: MEANS[name](*row) for name in metrics if name in MEANS} for row in rows]


def estimates(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    scores: Sequence[Mapping[str, float]],
) -> dict[str, Estimate]:
    """Each metric over all rows, by name; `scores` are their `row_scores`.

    Where some questions have no answer and others have one, SQuAD's metrics are given of either
    kind too, as the published script gives them: `has_answer_…` and `no_answer_…`.
    """
    found: dict[str, Estimate] = {}
    has_answer = np.asarray([bool(mine) for mine in references])
    for name in metrics:
        if name == BLEU:
            found[name] = bleu(predictions, references)
            continue
        values = np.asarray([row[name] for row in scores])
        found[name] = mean_estimate(values)
        if name in UNANSWERABLE and 0 < has_answer.sum() < len(values):
            found[f"has_answer_{name}"] = mean_estimate(values[has_answer])
            found[f"no_answer_{name}"] = mean_estimate(values[~has_answer])
    return found
