"""Check the names of tensors and leaves that come from outside, whatever the format.

Some formats turn names into file paths, trees are built from them, and all are displayed and
written again.
"""

import re
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

from recall_jax.errors import InputError, shown

MOST_CHARACTERS = 1000
_NO_NAMES = ("", ".", "..")
_NO_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def check_name(name: str, where: Path | str) -> None:
    """Raise InputError unless `name` is a relative path that stays below its root.

    Its components, separated by slashes, may not be empty, `.` or `..`; it may not contain control
    characters or lone surrogates, nor more than 1000 characters. `where` begins the message.
    """
    if len(name) > MOST_CHARACTERS:
        fault = f"has {len(name)} characters, over {MOST_CHARACTERS}"
    elif any(word in _NO_NAMES for word in name.split("/")):
        fault = "is empty, or leads elsewhere by its slashes and dots"
    elif _NO_CHARACTERS.search(name):
        fault = "has control characters or lone surrogates"
    else:
        return
    raise InputError(
        f"{where}: the name {shown(name)} {fault}: rename the tensor and save it again"
    )


def check_leaves(names: Iterable[str], where: Path | str) -> None:
    """Raise InputError unless all names are valid and distinct, and none is a parent of another."""
    leaves: set[str] = set()
    folders: set[str] = set()
    for name in names:
        check_name(name, where)
        if name in leaves:
            raise InputError(f"{where}: two leaves are called {name}: save it again")
        leaves.add(name)
        folders.update(accumulate(name.split("/")[:-1], lambda above, word: f"{above}/{word}"))
    if both := leaves & folders:
        raise InputError(f"{where}: {min(both)} is a leaf and holds others: save it again")
