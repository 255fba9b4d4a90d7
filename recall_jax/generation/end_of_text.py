"""Find the tokens that begin and end a model's texts."""

from collections.abc import Mapping
from typing import Any

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.errors import InputError
from recall_jax.files.json_objects import read_json_object
from recall_jax.generation.prompt_tokens import encode_prompt
from recall_jax.inputs.tokens import Tokenizer


def end_of_text(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the token ids that end a text, from the generation config or else the config.

    Raises:
        InputError: if neither has any.
    """
    for config in _configs(checkpoint):
        match config.get("eos_token_id"):
            case int(token):
                return (token,)
            case list(tokens) if tokens:
                return tuple(tokens)
    raise InputError(f"{checkpoint.name} has no eos_token_id: add it to its config.json")


def start_of_text(checkpoint: Checkpoint, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids that a text begins with.

    These are the ones that the tokenizer puts before every text, else the config's bos_token_id,
    else the token that ends a text. Raises InputError if there is none of them.
    """
    if before := encode_prompt(tokenizer, ""):
        return before
    known = [config.get("bos_token_id") for config in _configs(checkpoint)]
    starts = [token for token in known if isinstance(token, int)]
    return starts[:1] or [end_of_text(checkpoint)[0]]


def _configs(checkpoint: Checkpoint) -> list[Mapping[str, Any]]:
    """Return the generation config, if there is one, and the config."""
    generation = checkpoint.folder / "generation_config.json"
    found = [read_json_object(generation)] if generation.is_file() else []
    return [*found, checkpoint.config]
