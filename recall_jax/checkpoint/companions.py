"""The files that make weights a model: config, generation config, tokenizer, chat template."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.checkpoint.json_objects import read_json_object
from recall_jax.errors import InputError

CONFIG_NAME = "config.json"

# Everything transformers saves beside the weights of a text model; no code, no weights.
_NAMES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATES = "additional_chat_templates"


def copy_companions(source: Path, target: Path, *, dtype: np.dtype[Any] | None = None) -> None:
    """Copy them from one model folder into another; links are copied as what they point to.

    With `dtype`, the copied config says that the weights are of it. InputError if the config is
    missing or malformed, or a file cannot be copied.
    """
    config = read_json_object(source / CONFIG_NAME)
    names = [name for name in _NAMES if (source / name).is_file()]
    names += [f"{_TEMPLATES}/{path.name}" for path in sorted((source / _TEMPLATES).glob("*.jinja"))]
    try:
        if dtype is None:
            shutil.copyfile(source / CONFIG_NAME, target / CONFIG_NAME)
        else:
            config.update(dict.fromkeys(_dtype_keys(config), dtype.name))
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            (target / CONFIG_NAME).write_text(text, encoding="utf-8")
        for name in names:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
    except OSError as error:
        raise InputError(f"cannot copy {error.filename} to {target}: {error.strerror}") from error


def _dtype_keys(config: dict[str, Any]) -> list[str]:
    """The key of transformers 5, or the older one where the config has it."""
    return [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
