"""Where the tensors of an adapter belong in a checkpoint, by their names alone.

A base checkpoint may have been saved from another wrapper of the model than the one that was
adapted, so its names may have, or lack, a prefix (`model.`, `transformer.`).
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from recall_jax.checkpoint.class_defaults import attribute
from recall_jax.errors import InputError

_HEADS = ("lm_head",)
_EMBEDDINGS = ("embed_tokens", "wte")
_SHOWN = 3


def is_head(name: str) -> bool:
    """Whether `name` is the weight of an output head."""
    return _is_weight_of(name, _HEADS)


def is_vocabulary(name: str) -> bool:
    """Whether `name` is a weight with a row per token: of the input embedding or output head."""
    return _is_weight_of(name, _HEADS + _EMBEDDINGS)


def is_tied(base_names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether input embedding and output head are one weight.

    Where neither the config nor the class of its family knows, the weights tell.
    """
    return bool(attribute(config, "tie_word_embeddings", not any(map(is_head, base_names))))


def input_embedding(base_names: Iterable[str], where: str) -> str:
    """Name of the input embedding's weight; InputError if there is none, or more than one."""
    found = [name for name in base_names if _is_weight_of(name, _EMBEDDINGS)]
    if len(found) != 1:
        raise InputError(f"{where}: which is the base's input embedding? It has {found or 'none'}")
    return found[0]


def find_places(
    wanted: Iterable[str], base_names: Collection[str], where: str
) -> dict[str, str | None]:
    """For each wanted name the tensor of the base: its namesake, else the one with more or less
    of a prefix, else None. InputError if a name fits several tensors, or a tensor several names.
    """
    by_tail = defaultdict(list)
    for name in base_names:
        for tail in _tails(name):
            by_tail[tail].append(name)
    places: dict[str, str | None] = {}
    taken: dict[str, str] = {}
    for name in wanted:
        shorter = [tail for tail in _tails(name) if tail in base_names]
        fits = [name] if name in base_names else by_tail.get(name, []) + shorter
        if len(fits) > 1:
            raise InputError(f"{where}: {name} could be {' or '.join(fits[:_SHOWN])} of the base")
        places[name] = fits[0] if fits else None
        if fits and taken.setdefault(fits[0], name) != name:
            raise InputError(f"{where}: {taken[fits[0]]} and {name} are both {fits[0]} of the base")
    return places


def refuse_missing(places: Mapping[str, str | None], where: str) -> dict[str, str]:
    """`places`, if each name has one; else InputError that gives the first that have none."""
    missing = [name for name, place in places.items() if place is None]
    if missing:
        fitting = len(places) - len(missing)
        raise InputError(
            f"{where}: the base lacks {', '.join(missing[:_SHOWN])}"
            f"{', ...' if len(missing) > _SHOWN else ''} ({fitting} of {len(places)} fit); "
            "is it the base the adapter was trained on?"
        )
    return {name: place for name, place in places.items() if place is not None}


def _is_weight_of(name: str, modules: Collection[str]) -> bool:
    module, _, parameter = name.rpartition(".")
    return parameter == "weight" and module.rpartition(".")[2] in modules


def _tails(name: str) -> list[str]:
    """`b.c.d` and `c.d` of `a.b.c.d`: what is left without a prefix and still names a module."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts) - 1)]
