"""Measure how many prompts a model completes exactly as expected."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from recall_jax.evaluation.resident import load_resident
from recall_jax.generation.generate import generate
from recall_jax.generation.prompt_tokens import encode_prompt
from recall_jax.inputs.tokens import UNLIMITED

Row = Mapping[str, str]


def exact_match_rate(model: str | Path, rows: Sequence[Row], batch_size: int = 64) -> float:
    """Return the fraction of `rows` that the model answers exactly; see `exact_matches`."""
    return float(np.mean(exact_matches(model, rows, batch_size)))


def exact_matches(model: str | Path, rows: Sequence[Row], batch_size: int = 64) -> np.ndarray:
    """Return which of `rows` (`prompt`, `completion`) the model answers exactly, bool (n,).

    The tokens decoded greedily after the prompt, up to the end of text, must equal those of the
    completion. Raises InputError for a model that cannot be read, or that has no end of text.
    """
    resident = load_resident(model)
    prompts = [encode_prompt(resident.tokenizer, row["prompt"]) for row in rows]
    expected = [resident.tokenizer.encode(row["completion"], UNLIMITED, False) for row in rows]
    decoded = generate(
        resident.arch,
        resident.params,
        prompts,
        # One more than the longest, so that an answer that continues after its completion fails.
        max_new_tokens=max(map(len, expected)) + 1,
        eos_token_ids=resident.eos_token_ids,
        batch_size=batch_size,
    )
    return np.asarray([answer == right for answer, right in zip(decoded, expected, strict=True)])
