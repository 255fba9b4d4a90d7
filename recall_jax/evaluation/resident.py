"""Load a model into memory, with its tokenizer, to generate text and score likelihoods."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recall_jax.checkpoint.class_defaults import attribute
from recall_jax.checkpoint.folder import Checkpoint, open_checkpoint
from recall_jax.engine.inputs import common_architecture
from recall_jax.generation.end_of_text import end_of_text
from recall_jax.inputs.tokens import Tokenizer, load_tokenizer
from recall_jax.models.architecture import Architecture
from recall_jax.models.convert import tensor_shapes, to_flax

DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True)
class ResidentModel:
    """Hold a model in memory, with what generation and likelihoods need.

    `params` are numpy arrays in the dtype on disk, in the tree of `convert.to_flax`. `max_length`
    is the largest number of tokens that the model's config allows.
    """

    arch: Architecture
    params: dict[str, Any]
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    max_length: int


def load_resident(model: str | Path, ignore_config: Collection[str] = ()) -> ResidentModel:
    """Load a model by a name as in recipes: a folder or a hub id, possibly with adapters.

    Attributes of its config in `ignore_config` may be unknown.

    Raises:
        InputError: if it cannot be read, or does not say which tokens end a text.
    """
    checkpoint = open_checkpoint(model)
    return with_weights(without_weights(checkpoint, ignore_config), checkpoint)


def without_weights(checkpoint: Checkpoint, ignore_config: Collection[str] = ()) -> ResidentModel:
    """Load and check a model as `load_resident` does, but leave its `params` empty."""
    arch = common_architecture([checkpoint], ignore_config)
    tokenizer = load_tokenizer(checkpoint.tokenizer_folders, arch.family)
    max_length = attribute(checkpoint.config, "max_position_embeddings") or DEFAULT_MAX_LENGTH
    return ResidentModel(arch, {}, tokenizer, end_of_text(checkpoint), max_length)


def with_weights(model: ResidentModel, checkpoint: Checkpoint) -> ResidentModel:
    """Return the model with the `params` of the same checkpoint."""
    tensors = {name: checkpoint.read(name) for name in tensor_shapes(model.arch)}
    return replace(model, params=to_flax(model.arch, tensors))
