"""The files that make weights a model: config, generation config, tokenizer, chat template."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.checkpoint.json_objects import read_json_object
from recall_jax.errors import storage_faults

CONFIG_NAME = "config.json"

# Everything transformers saves beside the weights of a text model; no code, no weights.
_GENERATION = "generation_config.json"
_TOKENIZER = (
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


def copy_companions(
    source: Path,
    target: Path,
    *,
    config: Mapping[str, Any] | None = None,
    tokenizers: Sequence[Path] = (),
    dtype: np.dtype[Any] | None = None,
) -> None:
    """Copy them from one model folder into another; links are copied as what they point to.

    `config` stands in for the source's own, as an adapter may change it; the tokenizer comes from
    the first folder of `tokenizers` that has one, else from the source. With `dtype`, the copied
    config says that the weights are of it. InputError if the config is missing or malformed, or a
    file cannot be copied, StorageError if the disk fails.
    """
    own = read_json_object(source / CONFIG_NAME)
    written = dict(own if config is None else config)
    if dtype is not None:
        written.update(dict.fromkeys(_dtype_keys(written), dtype.name))
    copies = companions(source, tokenizers)
    if written == own:
        copies[CONFIG_NAME] = source / CONFIG_NAME
    else:
        with storage_faults(f"write {target / CONFIG_NAME}"):
            text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
            (target / CONFIG_NAME).write_text(text, encoding="utf-8")
    for name, path in copies.items():
        with storage_faults(f"copy {path} to {target}"):
            if path.parent.name == _TEMPLATES:
                (target / _TEMPLATES).mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)


def companions(source: Path, tokenizers: Sequence[Path] = ()) -> dict[str, Path]:
    """What is copied beside the config, by its name in the model folder."""
    with_tokenizer = next(filter(has_tokenizer, tokenizers), source)
    templates = sorted((with_tokenizer / _TEMPLATES).glob("*.jinja"))
    names = [*_TOKENIZER, *(f"{_TEMPLATES}/{path.name}" for path in templates)]
    found = {name: with_tokenizer / name for name in names} | {_GENERATION: source / _GENERATION}
    return {name: path for name, path in found.items() if path.is_file()}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of its own."""
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    return any((folder / name).is_file() for name in known)


def _dtype_keys(config: dict[str, Any]) -> list[str]:
    """The key of transformers 5, or the older one where the config has it."""
    return [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
