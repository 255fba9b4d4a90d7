"""Which tokens end a model's texts."""

from collections.abc import Mapping
from typing import Any

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.checkpoint.json_objects import read_json_object
from recall_jax.errors import InputError


def end_of_text(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The token ids that end a text, of the generation config or else the config.

    Raises:
        InputError: if neither has any.
    """
    generation = checkpoint.folder / "generation_config.json"
    configs: list[Mapping[str, Any]] = [checkpoint.config]
    if generation.is_file():
        configs.insert(0, read_json_object(generation))
    for config in configs:
        match config.get("eos_token_id"):
            case int(token):
                return (token,)
            case list(tokens) if tokens:
                return tuple(tokens)
    raise InputError(f"{checkpoint.name} has no eos_token_id: add it to its config.json")
