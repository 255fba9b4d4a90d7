"""Match the tensor names of an adapter with those of a checkpoint.

A base checkpoint may have been saved from another wrapper class than the adapted model, so its
names may have, or lack, a prefix (`model.`, `transformer.`).
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from recall_jax.errors import InputError

_SHOWN = 3


def find_places(
    wanted: Iterable[str], base_names: Collection[str], where: str
) -> dict[str, str | None]:
    """Map each wanted name to a tensor of the base, or to None if there is none.

    The base's tensor has the same name, or one with more or less of a prefix. Raises InputError if
    a name fits several tensors, or a tensor several names.
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
    """Return `places` if every name has a tensor; else raise InputError with the first without."""
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
    """Return the name without one or more prefixes: `b.c.d` and `c.d` for `a.b.c.d`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts) - 1)]
