"""Complete a config.json with the defaults of the model's config class in transformers.

Each version of transformers omits other attributes that have their default, such as Gemma's
`tie_word_embeddings`, and writes some in another form, such as `rope_theta`. We read the classes
themselves, so that no copy of their defaults can become outdated. Importing them takes a second or
two, so they are used only for what a file omits.
"""

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from recall_jax.errors import InputError, reading

# Lengths, sizes and ids, which make no list grow. Other numbers, such as layers, may.
_MEASURES = re.compile("vocab|token|position|theta|freq|length|len|window|max|size|_id")
_MOST_LISTED = 100_000
# Every model needs these: the families of most merges get them without the import.
_KNOWN = {
    family: {"tie_word_embeddings": False} for family in ("llama", "mistral", "qwen2", "qwen3")
}


def attribute(config: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Return attribute `name` from config.json, or its default from the family's config class.

    An attribute missing at the top level is looked up in the text part of the config. Returns
    `default` if neither the file nor the class has it.
    """
    if name in config:
        return config[name]
    if name in (known := _KNOWN.get(str(config.get("model_type")), {})):
        return known[name]
    instance = _instance(config) or _instance({"model_type": config.get("model_type")})
    if instance is None:
        text = config.get("text_config")
        return attribute(text, name, default) if isinstance(text, Mapping) else default
    return getattr(instance, name, getattr(instance.get_text_config(), name, default))


def completed(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return a config.json completed by its config class, in the form of transformers 5.

    Returns None if transformers has no class for the `model_type`, or the class refuses the values.
    """
    instance = _instance(config)
    return None if instance is None else instance.to_dict()


def _instance(config: Mapping[str, Any]) -> Any:
    """Return the config as an object of its class, or None as for `completed`."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return None
    try:
        with reading("config.json"), _silence():
            # the class modifies the dictionaries it is given
            copied = copy.deepcopy(dict(config))
            return CONFIG_MAPPING[model_type].from_dict(copied) if is_safe(copied) else None
    except InputError:
        return None


def is_safe(value: Any, name: str = "") -> bool:
    """Return whether transformers' config class may be built from untrusted values.

    It makes lists as long as the numbers in the config, and loads a named `backbone` from the hub.
    """
    if isinstance(value, Mapping):
        return all(is_safe(inner, key) for key, inner in value.items())
    if isinstance(value, list):
        return all(is_safe(inner, name) for inner in value)
    if isinstance(value, int):
        return value <= _MOST_LISTED or _MEASURES.search(name) is not None
    return not (name == "backbone" and isinstance(value, str))


@contextmanager
def _silence() -> Iterator[None]:
    """Silence the library's messages about a config: we do not run the model with it."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(before)
