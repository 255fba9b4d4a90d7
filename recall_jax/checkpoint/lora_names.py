"""Where the tensors of an adapter belong in a checkpoint, by their names alone.

A base checkpoint may have been saved from another wrapper of the model than the one that was
adapted, so its names may have, or lack, a prefix (`model.`, `transformer.`).
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from recall_jax.errors import InputError

_SHOWN = 3


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


def _tails(name: str) -> list[str]:
    """`b.c.d` and `c.d` of `a.b.c.d`: what is left without a prefix and still names a module."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts) - 1)]
