"""Run a model on the examples of a task, and score its answers."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from recall_jax.errors import InputError
from recall_jax.evaluation.examples import Example
from recall_jax.evaluation.lengths import check_memory
from recall_jax.evaluation.likelihood import log_likelihoods, token_nll
from recall_jax.evaluation.metrics import (
    OF_TEXTS,
    Estimate,
    estimates,
    mean_estimate,
    normalise_answer,
    row_scores,
    text_estimates,
)
from recall_jax.evaluation.resident import ResidentModel
from recall_jax.evaluation.stop_strings import before_any, stops_at
from recall_jax.evaluation.task import Generation, Likelihood, Perplexity, Task
from recall_jax.generation.generate import generate
from recall_jax.generation.prompt_tokens import encode_prompt
from recall_jax.inputs.tokens import UNLIMITED, Tokenizer

ACCURACY = "accuracy"
_BATCHES_AT_ONCE = 64  # number of batches between two calls of `progress`


@dataclass(frozen=True)
class Scored:
    """Hold a model's metrics on a task, and its answers, a JSON object for each example."""

    metrics: dict[str, Estimate]
    predictions: list[dict[str, Any]]


def headline(task: Task) -> tuple[str, ...]:
    """Return the names of a task's main metrics; `Scored.metrics` may hold more."""
    if isinstance(task.scoring, Perplexity):
        return OF_TEXTS
    return task.metrics or (ACCURACY,)


def score(
    task: Task,
    examples: Sequence[Example],
    model: ResidentModel,
    *,
    batch_size: int,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[int], None] = lambda done: None,
) -> Scored:
    """Run a model on all examples of a task, and score its answers; the forward runs in `dtype`.

    `progress(done)` is called from time to time with the number of examples done. Prompts are never
    truncated. Raises InputError for a prompt or a choice that has no tokens or is too long for the
    memory, and for a model whose likelihoods are NaN.
    """
    check_memory(task, examples, model, batch_size)
    scoring, run = task.scoring, (model, batch_size, dtype)
    answers: list[Any] = []
    for start in range(0, len(examples), _BATCHES_AT_ONCE * batch_size):
        block = examples[start : start + _BATCHES_AT_ONCE * batch_size]
        if isinstance(scoring, Likelihood):
            answers += _choose(scoring, block, *run)
        elif isinstance(scoring, Perplexity):
            answers += _measure_texts(block, *run)
        else:
            answers += _generate(scoring, block, *run)
        progress(len(answers))
    if isinstance(scoring, Likelihood):
        return _accuracy(answers)
    if isinstance(scoring, Perplexity):
        counts = ([row[name] for row in answers] for name in ("nats", "tokens", "bytes"))
        return Scored(text_estimates(*counts), answers)
    if task.metrics is None:
        return _accuracy(list(map(_parse_choice, examples, answers)))
    return _apply_metrics(task.metrics, scoring, examples, answers)


def split_tokens(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], ...]:
    """Return token ids of a context and of its continuation, tokenised as one text.

    Spaces at the end of the context belong to the continuation: the token of its first word
    includes them.
    """
    stripped = context.rstrip()
    count = len(encode_prompt(tokenizer, stripped))
    tokens = encode_prompt(tokenizer, context + continuation)
    return tokens[:count], tokens[count:]


def _choose(
    scoring: Likelihood,
    examples: Sequence[Example],
    model: ResidentModel,
    batch_size: int,
    dtype: DTypeLike,
) -> list[dict[str, Any]]:
    """Return each example's answer record with its likeliest choice, the first of equal ones."""
    pairs = []
    for example in examples:
        options = [split_tokens(model.tokenizer, example.prompt, each) for each in example.choices]
        if not all(all(pair) for pair in options):
            raise InputError(f"row {example.row} (from 0): its prompt or a choice has no tokens")
        pairs += options
    contexts, continuations = zip(*pairs, strict=True)
    sums, _, counts = log_likelihoods(
        model.arch, model.params, contexts, continuations, batch_size=batch_size, dtype=dtype
    )
    _check_numbers(sums)
    ends = np.cumsum([len(example.choices) for example in examples])[:-1]
    rows = zip(examples, np.split(sums, ends), np.split(counts, ends), strict=True)
    return [_likeliest(scoring, *row) for row in rows]


def _likeliest(
    scoring: Likelihood, example: Example, sums: np.ndarray, tokens: np.ndarray
) -> dict[str, Any]:
    chosen = int(np.argmax(sums / _lengths(scoring, example, tokens)))
    measured = {"log_likelihoods": sums.tolist(), "tokens": tokens.tolist()}
    right = float(chosen == example.answer)
    return {**_example_record(example), **measured, "prediction": chosen, ACCURACY: right}


def _lengths(scoring: Likelihood, example: Example, tokens: np.ndarray) -> np.ndarray:
    """Return the divisor of each choice's log-likelihood."""
    if scoring.normalise == "token":
        return tokens
    if scoring.normalise == "byte":
        return np.asarray([len(choice.encode()) for choice in example.choices])
    return np.ones(len(tokens))


def _measure_texts(
    examples: Sequence[Example], model: ResidentModel, batch_size: int, dtype: DTypeLike
) -> list[dict[str, Any]]:
    """Return each text's negative log-likelihood in nats, and its numbers of tokens and bytes.

    The context of a text is the token that the tokenizer adds before it, or else an end of text.
    """
    tokenizer = model.tokenizer
    rows = [tokenizer.encode(example.prompt, UNLIMITED, False) for example in examples]
    for example, row in zip(examples, rows, strict=True):
        if not row:
            raise InputError(f"row {example.row} (from 0): its text has no tokens")
    nats, tokens = token_nll(
        model.arch,
        model.params,
        rows,
        max_length=model.max_length,
        prefix_token_id=(*tokenizer.encode("", UNLIMITED, True), *model.eos_token_ids)[0],
        batch_size=batch_size,
        dtype=dtype,
    )
    _check_numbers(nats)
    return [
        {
            "row": example.row,
            "prompt": example.prompt,
            "nats": float(nll),
            "tokens": int(count),
            "bytes": len(example.prompt.encode()),
        }
        for example, nll, count in zip(examples, nats, tokens, strict=True)
    ]


def _check_numbers(likelihoods: np.ndarray) -> None:
    if np.isnan(likelihoods).any():
        raise InputError("the model gives NaN as a likelihood: try evaluate.compute_dtype float32")


def _generate(
    scoring: Generation,
    examples: Sequence[Example],
    model: ResidentModel,
    batch_size: int,
    dtype: DTypeLike,
) -> list[str]:
    """Return the text generated after each prompt, up to a stop string."""
    tokenizer = model.tokenizer
    prompts = [encode_prompt(tokenizer, example.prompt) for example in examples]
    for example, prompt in zip(examples, prompts, strict=True):
        if not prompt:
            raise InputError(f"row {example.row} (from 0): its prompt has no tokens")
    new = generate(
        model.arch,
        model.params,
        prompts,
        max_new_tokens=scoring.max_new_tokens,
        eos_token_ids=model.eos_token_ids,
        batch_size=batch_size,
        dtype=dtype,
        stop=stops_at(tokenizer, scoring.stop),
    )
    return [before_any(tokenizer.decode(tokens), scoring.stop) for tokens in new]


def _parse_choice(example: Example, text: str) -> dict[str, Any]:
    """Return the answer record with the choice that a generated text names."""
    chosen = _named_choice(text, example.choices)
    right = float(chosen == example.answer)
    return {**_example_record(example), "generated": text, "prediction": chosen, ACCURACY: right}


def _accuracy(predictions: list[dict[str, Any]]) -> Scored:
    return Scored({ACCURACY: mean_estimate([row[ACCURACY] for row in predictions])}, predictions)


def _apply_metrics(
    metrics: Sequence[str], scoring: Generation, examples: Sequence[Example], texts: Sequence[str]
) -> Scored:
    answers = [_answer(text, scoring.no_answer) for text in texts]
    references = [example.references for example in examples]
    scores = row_scores(metrics, answers, references)
    predictions = [
        {**_example_record(example), "generated": text, "prediction": answer, **by_metric}
        for example, text, answer, by_metric in zip(examples, texts, answers, scores, strict=True)
    ]
    return Scored(estimates(metrics, answers, references, scores), predictions)


def _answer(text: str, no_answer: str | None) -> str:
    """Strip white space; an answer that equals `no_answer` once normalised becomes empty."""
    if no_answer is not None and normalise_answer(text) == normalise_answer(no_answer):
        return ""
    return text.strip()


def _named_choice(text: str, choices: Sequence[str]) -> int | None:
    """Return the index of the longest choice whose words begin the text, None if there is none."""
    words = _words(text)
    matching = [
        index
        for index, choice in enumerate(choices)
        if (prefix := _words(choice)) and words[: len(prefix)] == prefix
    ]
    return max(matching, key=lambda index: len(_words(choices[index])), default=None)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _example_record(example: Example) -> dict[str, Any]:
    record: dict[str, Any] = {"row": example.row, "prompt": example.prompt}
    if example.choices:
        return record | {"choices": example.choices, "answer": example.answer}
    return record | {"references": example.references}
