"""Read the attributes of a config.json with checks."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from recall_jax.errors import InputError, brief, shown

_REQUIRED = object()
_MOST_NAMES = 20  # attributes listed in a message
_LARGEST = 2**31 - 1  # of an axis, and of a position


class Attributes:
    """Read the attributes of one JSON object; those that no caller reads are unknown.

    Every method that reads one raises InputError if it is missing or invalid. It may be missing if
    a default is given.
    """

    def __init__(self, attributes: Mapping[str, Any], where: str) -> None:
        """Read from `attributes`; `where` names the file, and the object in it, in errors."""
        self.remaining = dict(attributes)
        self.where = where

    def _take(self, name: str, default: Any, kind: Any, what: str, null: bool = False) -> Any:
        if name not in self.remaining:
            if default is _REQUIRED:
                raise InputError(f"{self.where}: {name} is missing, and must be {what}")
            return default
        value = self.remaining.pop(name)
        if value is None and (null or default is None):
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(name, value, what)
        return value

    def error(self, name: str, value: Any, what: str) -> InputError:
        """Return the error that `name` has the invalid `value`; `what` describes a valid one."""
        return InputError(f"{self.where}: {name} is {shown(value)}, and must be {what}")

    def integer(
        self, name: str, default: Any = _REQUIRED, *, minimum: int = 1, null: bool = False
    ) -> Any:
        """Read an integer of at least `minimum`.

        Null is allowed if `null`, or if the default is None.
        """
        what = f"an integer of at least {minimum}"
        value = self._take(name, default, int, what, null)
        if value is not None and value > _LARGEST:
            raise self.error(name, value, f"an integer of at most {_LARGEST}")
        if value is not None and value < minimum:
            raise self.error(name, value, what)
        return value

    def number(self, name: str, default: Any = _REQUIRED, minimum: float = 0.0) -> Any:
        """Read a finite number above zero and at least `minimum`; null if the default is None."""
        what = f"a number of at least {minimum:g}" if minimum else "a number above zero"
        value = self._take(name, default, (int, float), what)
        if value is not None and not (math.isfinite(value) and value > 0 and value >= minimum):
            raise self.error(name, value, what)
        return None if value is None else float(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """Read true or false."""
        return self._take(name, default, bool, "true or false")

    def choice(self, name: str, choices: Collection[str], default: Any = _REQUIRED) -> Any:
        """Read one of a few words; null is allowed if the default is None."""
        what = "one of " + ", ".join(choices)
        value = self._take(name, default, str, what)
        if value is not None and value not in choices:
            raise self.error(name, value, what)
        return value

    def object(self, name: str) -> dict[str, Any]:
        """Read a JSON object, empty if absent or null."""
        return self._take(name, None, dict, "an object or null") or {}

    def words(self, name: str) -> list[str] | None:
        """Read a list of strings, or None if absent or null."""
        value = self._take(name, None, list, "a list of strings or null")
        if value is not None and not all(isinstance(word, str) for word in value):
            raise self.error(name, value, "a list of strings or null")
        return value

    def drop(self, harmless: Collection[str] = (), inert: Mapping[str, Any] | None = None) -> None:
        """Forget attributes without effect: null, by name, or by name and value."""
        for name, value in list(self.remaining.items()):
            same = inert is not None and name in inert and value == inert[name]
            if value is None or name in harmless or same:
                del self.remaining[name]

    def finish(self, flag_prefix: str = "") -> None:
        """Raise InputError for the attributes that have not been read or dropped."""
        if self.remaining:
            some = [brief(name, 80) for name in sorted(self.remaining)[:_MOST_NAMES]]
            rest = f" and {len(self.remaining) - len(some)} more" * (
                len(self.remaining) > len(some)
            )
            flags = " ".join(f"--ignore-config {flag_prefix}{name}" for name in some)
            raise InputError(
                f"{self.where}: not understood, and may change what the model computes: "
                f"{', '.join(some)}{rest}; if you are sure that it does not, pass {flags}"
            )
