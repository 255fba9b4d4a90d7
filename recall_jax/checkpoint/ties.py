"""Whether the output head of a model is its input embedding: its config says, its weights decide.

Where a config ties the two and the files hold both, a model of which they differ has a head of its
own, whatever its config says: so transformers 5 reads it, and so peft with transformers 4 leaves
models whose head was trained apart.
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
# What the head reads is divided by the root of its width where the config ties head and embedding.
_SCALED_WHERE_TIED = ("t5", "longt5", "umt5", "switch_transformers", "udop", "pop2piano")


def is_head(name: str) -> bool:
    """Whether `name` is the weight of an output head."""
    return _is_weight_of(name, _HEADS) and unit_of_tensor(name) == HEAD


def is_embedding(name: str) -> bool:
    """Whether `name` is the weight of an input embedding of tokens."""
    return _is_weight_of(name, _EMBEDDINGS) and unit_of_tensor(name) == EMBED


def is_vocabulary(name: str) -> bool:
    """Whether `name` is a weight with a row per token: of the input embedding or output head."""
    return is_head(name) or is_embedding(name)


def input_embedding(names: Iterable[str], where: str) -> str:
    """Name of the input embedding's weight; InputError if there is none, or more than one."""
    found = list(filter(is_embedding, names))
    if len(found) != 1:
        raise InputError(f"{where}: which is the base's input embedding? It has {found or 'none'}")
    return found[0]


def is_tied(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether input embedding and output head are one weight, of a model with these tensors.

    Where neither the config nor the class of its family knows, the weights tell.
    """
    return bool(attribute(config, _KEY, not any(map(is_head, names))))


def stored_twice(names: Collection[str], config: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """The head of a model that ties it, and the embeddings that it may be, where all are stored."""
    heads, embeddings = list(filter(is_head, names)), list(filter(is_embedding, names))
    if len(heads) != 1 or not embeddings or attribute(config, _KEY) is not True:
        return None
    return heads[0], embeddings


def shared_embedding(names: Collection[str]) -> tuple[str, list[str]] | None:
    """The embedding that an encoder and a decoder share, and those that may be the same once more.

    None of a model that has none by such a name.
    """
    embeddings = list(filter(is_embedding, names))
    shared = [name for name in embeddings if _is_weight_of(name, ("shared",))]
    if len(shared) != 1:
        return None
    return shared[0], [name for name in embeddings if name != shared[0]]


def untied(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config of the same model with a head of its own.

    InputError for the families in which the tie says more than that.
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


def with_a_head(
    specs: Mapping[str, TensorSpec], where: str, head: str = LM_HEAD
) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The tensors of a tied model with the `head` apart, and what that begins as: the embedding.

    InputError if it is not clear which tensor the embedding is.
    """
    embedding = input_embedding(specs, where)
    return {**specs, head: specs[embedding]}, {head: embedding}


def _is_weight_of(name: str, modules: Collection[str]) -> bool:
    module, _, parameter = name.rpartition(".")
    return parameter == "weight" and module.rpartition(".")[2] in modules
