"""What a config.json leaves unsaid, as the class of its family in transformers fills it in.

Each version of transformers leaves out other attributes that have their default, such as Gemma's
`tie_word_embeddings`, and writes some in another form, such as `rope_theta`. The classes themselves
are asked, so that no copy of them can grow old. They take a second or two to import, so they are
asked for no more than what a file does not say.
"""

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from recall_jax.errors import InputError, reading

# Lengths, sizes and ids, of which a class makes no list; of all else, layers above all, it may.
_MEASURES = re.compile("vocab|token|position|theta|freq|length|len|window|max|size|_id")
_MOST_LISTED = 100_000
# What is asked of every model, of the families that most merges are of: these need no import.
_KNOWN = {
    family: {"tie_word_embeddings": False} for family in ("llama", "mistral", "qwen2", "qwen3")
}


def attribute(config: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Attribute `name` of a model: as its config.json says, else as the class of its family does.

    Where a config has parts, and its whole no such attribute, it is that of the text part; it is
    `default` where neither file nor class knows.
    """
    if name in config:
        return config[name]
    if name in (known := _KNOWN.get(str(config.get("model_type")), {})):
        return known[name]
    whole = _instance(config) or _instance({"model_type": config.get("model_type")})
    if whole is None:
        text = config.get("text_config")
        return attribute(text, name, default) if isinstance(text, Mapping) else default
    return getattr(whole, name, getattr(whole.get_text_config(), name, default))


def completed(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """All that the class of its family makes of a config.json, in the form of transformers 5.

    None where transformers has no class for the `model_type`, or the class refuses the values.
    """
    whole = _instance(config)
    return None if whole is None else whole.to_dict()


def _instance(config: Mapping[str, Any]) -> Any:
    """The config as an object of its class, or None as for `completed`."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return None
    try:
        with reading("config.json"), _silence():
            # the class fills in what lies inside of what it is given
            own = copy.deepcopy(dict(config))
            return CONFIG_MAPPING[model_type].from_dict(own) if is_safe(own) else None
    except InputError:
        return None


def is_safe(value: Any, name: str = "") -> bool:
    """Whether a config may be read before its tensors are.

    Lists are made as long as numbers in it say, and the hub is asked for a backbone that it names.
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
    """No chatter of the library about a config: it is not asked to run it."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(before)
