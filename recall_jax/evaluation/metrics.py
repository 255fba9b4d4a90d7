"""Compute metrics of answers, on a scale from 0 to 100, and of texts, with standard errors.

A metric that is a mean over rows has the standard error of the mean; BLEU, a metric of the corpus,
has a bootstrap standard error.
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
"""Metrics of texts: lower is better, and there is no upper bound."""


class Estimate(NamedTuple):
    """Hold a metric over `rows` rows, and its standard error, None for a single row."""

    value: float
    standard_error: float | None
    rows: int


def mean_estimate(scores: ArrayLike) -> Estimate:
    """Return 100 times the mean of scores (n,) in [0, 1], with its standard error s / sqrt(n).

    s is the sample standard deviation, with n - 1 in the denominator.
    """
    values = 100 * np.asarray(scores, np.float64)
    if len(values) < 2:
        return Estimate(float(values.mean()), None, len(values))
    error = values.std(ddof=1) / np.sqrt(len(values))
    return Estimate(float(values.mean()), float(error), len(values))


def text_estimates(nats: ArrayLike, tokens: ArrayLike, num_bytes: ArrayLike) -> dict[str, Estimate]:
    """Return `perplexity` and `bits_per_byte` of n texts.

    perplexity is exp(sum nats / sum tokens); bits_per_byte is sum nats / (ln 2 · sum num_bytes),
    which is comparable between tokenizers. `nats` (n,) are negative log-likelihoods, `num_bytes`
    (n,) the lengths in UTF-8. The standard error of the perplexity is the perplexity times the
    standard error of its logarithm; both are clipped at the largest float64.
    """
    nll, count, size = (np.asarray(each, np.float64) for each in (nats, tokens, num_bytes))
    per_token, per_byte = _ratio(nll, count), _ratio(nll / np.log(2), size)
    largest = float(np.finfo(np.float64).max)
    with np.errstate(over="ignore"):
        value = min(float(np.exp(per_token.value)), largest)
    error = per_token.standard_error
    error = None if error is None else min(value * error, largest)
    perplexity = Estimate(value, error, per_token.rows)
    return dict(zip(OF_TEXTS, (perplexity, per_byte), strict=True))


def _ratio(above: np.ndarray, below: np.ndarray) -> Estimate:
    """Return sum above / sum below, with the standard error of a ratio (Cochran 1977, eq. 2.46)."""
    rows, value = len(above), above.sum() / below.sum()
    if rows < 2:
        return Estimate(float(value), None, rows)
    squares = np.sum((above - value * below) ** 2)
    error = np.sqrt(squares * rows / (rows - 1)) / below.sum()
    return Estimate(float(value), float(error), rows)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the answer equals one of `references` up to white space at the ends, else 0."""
    return float(prediction.strip() in [reference.strip() for reference in references])


def normalise_answer(text: str) -> str:
    """Normalise an answer as SQuAD does.

    Converts to lower case, removes ASCII punctuation and then the words a, an and the, and
    separates words by one space.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return SQuAD 2.0's exact match (Rajpurkar et al. 2018): 1 or 0.

    It is 1 if the normalised prediction equals a normalised reference. If there is no reference, or
    all normalise to nothing, the question has no answer and the right prediction is empty.
    """
    normalised = normalise_answer(prediction)
    return float(any(normalised == reference for reference in _normalised(references)))


def squad_f1(prediction: str, references: Sequence[str]) -> float:
    """Return SQuAD 2.0's F1 between the bags of words of normalised answers, in [0, 1].

    It is the highest F1 of any reference. If either bag is empty, it is 1 if both are, else 0.
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
    """Return corpus BLEU by sacrebleu's defaults: 13a tokens, 4-grams, exponential smoothing.

    Each prediction has one or more `references`. The standard error is the standard deviation over
    1000 bootstrap samples of the rows (Koehn 2004), drawn by a fixed seed. Raises InputError if
    sacrebleu is not installed.
    """
    metric = _sacrebleu()
    rows = [
        metric.sentence_score(prediction, list(accepted))
        for prediction, accepted in zip(predictions, references, strict=True)
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
    # Imported when used, since most tasks do not need it.
    try:
        import sacrebleu
    except ImportError as error:
        raise InputError("BLEU needs sacrebleu: pip install sacrebleu") from error
    return sacrebleu.BLEU(effective_order=True)  # silences its advice about single rows


MEANS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    metric.__name__: metric for metric in (exact_match, squad_exact_match, squad_f1)
}
"""Metrics that are means over rows: the function that scores one row, by name."""
UNANSWERABLE = ("squad_exact_match", "squad_f1")
"""Metrics that allow a question without references, whose right prediction is empty."""


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise InputError if a metric needs software that is not installed."""
    if BLEU in metrics:
        _sacrebleu()


def row_scores(
    metrics: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[dict[str, float]]:
    """Return the scores in [0, 1] of each prediction, by those of `metrics` that are means."""
    rows = zip(predictions, references, strict=True)
    return [{name: MEANS[name](*row) for name in metrics if name in MEANS} for row in rows]


def estimates(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    scores: Sequence[Mapping[str, float]],
) -> dict[str, Estimate]:
    """Return each metric over all rows, by name; `scores` are the `row_scores`.

    If only some questions have an answer, SQuAD's metrics are also computed for those with one and
    for those without, named as in the published script: `has_answer_…` and `no_answer_…`.
    """
    found: dict[str, Estimate] = {}
    has_answer = np.asarray([bool(accepted) for accepted in references])
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
