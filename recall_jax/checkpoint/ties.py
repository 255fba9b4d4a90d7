"""Decide whether a model's output head is tied to its input embedding.

If the config ties them but the files hold two that differ, the model has a separate head.
transformers 5 reads such a model this way; peft with transformers 4 writes one when the head was
trained separately.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from recall_jax.checkpoint.class_defaults import attribute
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.units import EMBED, HEAD, LM_HEAD, unit_of_tensor
from recall_jax.errors import InputError

_KEY = "tie_word_embeddings"
_HEADS = ("lm_head", "embed_out", "output_layer", "output", "decoder")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")
# These families scale the head's input by 1/sqrt(width) if the config ties the two.
_SCALED_WHERE_TIED = ("t5", "longt5", "umt5", "switch_transformers", "udop", "pop2piano")


def is_head(name: str) -> bool:
    """Return whether `name` is the weight of an output head."""
    return _is_weight_of(name, _HEADS) and unit_of_tensor(name) == HEAD


def is_embedding(name: str) -> bool:
    """Return whether `name` is the weight of an input embedding of tokens."""
    return _is_weight_of(name, _EMBEDDINGS) and unit_of_tensor(name) == EMBED


def is_vocabulary(name: str) -> bool:
    """Return whether `name` is a weight with one row per token: input embedding or output head."""
    return is_head(name) or is_embedding(name)


def input_embedding(names: Iterable[str], where: str) -> str:
    """Return the name of the input embedding's weight; InputError if there is not exactly one."""
    found = list(filter(is_embedding, names))
    if len(found) != 1:
        raise InputError(f"{where}: which is the base's input embedding? It has {found or 'none'}")
    return found[0]


def is_tied(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Return whether a model with these tensors ties its output head to its input embedding.

    If neither the config nor its family's config class states it, the tensors decide.
    """
    return bool(attribute(config, _KEY, not any(map(is_head, names))))


def stored_twice(names: Collection[str], config: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """Return a tied model's head and candidate embeddings if the files hold them all, else None."""
    heads, embeddings = list(filter(is_head, names)), list(filter(is_embedding, names))
    if len(heads) != 1 or not embeddings or attribute(config, _KEY) is not True:
        return None
    return heads[0], embeddings


def shared_embedding(names: Collection[str]) -> tuple[str, list[str]] | None:
    """Return the embedding that encoder and decoder share, and those that may be copies of it.

    Returns None if the model has no embedding of such a name.
    """
    embeddings = list(filter(is_embedding, names))
    shared = [name for name in embeddings if _is_weight_of(name, ("shared",))]
    if len(shared) != 1:
        return None
    return shared[0], [name for name in embeddings if name != shared[0]]


def untied(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the config of the same model with a separate head.

    Raises InputError for families in which the tie also scales the head's input.
    """
    if (model_type := config.get("model_type")) in _SCALED_WHERE_TIED:
        raise InputError(
            f"{where}: a {model_type} model cannot have a head apart from its embedding, as {_KEY} "
            "in its config also scales what the head reads: keep the two tied"
        )
    parts = {
        key: {**part, _KEY: False}
        for key, part in config.items()
        if isinstance(part, Mapping) and _KEY in part
    }
    return {**config, **parts, _KEY: False}


def with_separate_head(
    specs: Mapping[str, TensorSpec], where: str, head: str = LM_HEAD
) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Add a separate `head` to the tensors of a tied model; map it to the embedding it starts as.

    Raises InputError if the embedding is ambiguous.
    """
    embedding = input_embedding(specs, where)
    return {**specs, head: specs[embedding]}, {head: embedding}


def _is_weight_of(name: str, modules: Collection[str]) -> bool:
    module, _, parameter = name.rpartition(".")
    return parameter == "weight" and module.rpartition(".")[2] in modules
