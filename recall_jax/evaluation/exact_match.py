"""The share of prompts that a model completes exactly as asked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.checkpoint.folder import Checkpoint, open_checkpoint
from recall_jax.checkpoint.json_objects import read_json_object
from recall_jax.errors import InputError
from recall_jax.evaluation.decoding import greedy_decode
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import check_tensors, tensor_shapes, to_flax
from recall_jax.representations.tokens import load_tokenizer

Row = Mapping[str, str]


def exact_match(model: str | Path, rows: Sequence[Row], batch_size: int = 64) -> float:
    """The share of `rows` (`prompt`, `completion`) that the model answers exactly, by token."""
    return float(np.mean(exact_matches(model, rows, batch_size)))


def exact_matches(model: str | Path, rows: Sequence[Row], batch_size: int = 64) -> np.ndarray:
    """Which of `rows` the model answers exactly, bool (n,).

    Greedily decoded from the prompt's tokens, the new tokens up to the end of text must be those of
    the completion. Raises InputError for a model that cannot be read, or that has no end of text.
    """
    checkpoint = open_checkpoint(model)
    arch = read_architecture(checkpoint.config, where=f"{model}/config.json")
    check_tensors(arch, {name: s.shape for name, s in checkpoint.specs.items()}, str(model))
    tree = to_flax(arch, {name: checkpoint.read(name) for name in tensor_shapes(arch)})
    tokenizer = load_tokenizer(checkpoint.tokenizer_folders, arch.family)
    unlimited = 2**31 - 1
    prompts = [tokenizer.encode(row["prompt"], unlimited, True) for row in rows]
    expected = [tokenizer.encode(row["completion"], unlimited, False) for row in rows]
    # One more than the longest, so that an answer that does not end in time is no match.
    budget = max(map(len, expected)) + 1
    decoded = greedy_decode(arch, tree, prompts, budget, end_of_text(checkpoint), batch_size)
    return np.asarray([mine == its for mine, its in zip(decoded, expected, strict=True)])


def end_of_text(checkpoint: Checkpoint) -> list[int]:
    """The token ids that end a text, of the generation config or else the config."""
    generation = checkpoint.folder / "generation_config.json"
    configs: list[Mapping[str, Any]] = [checkpoint.config]
    if generation.is_file():
        configs.insert(0, read_json_object(generation))
    for config in configs:
        match config.get("eos_token_id"):
            case int(token):
                return [token]
            case list(tokens) if tokens:
                return tokens
    raise InputError(f"{checkpoint.name} has no eos_token_id: add it to its config.json")
