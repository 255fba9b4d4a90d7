"""Parse measures such as `cka,mutual_knn(k=5),rsa(rdm=euclidean,compare=pearson)`."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from recall_jax.errors import InputError, shown
from recall_jax.similarity.measure import Measure, check_options
from recall_jax.similarity.measures import ALIASES, MEASURES, find_measure

# A name, options in parentheses if there are any, and a comma or the end.
_ITEM = re.compile(r"\s*([^\s,()=]+)\s*(?:\(([^()]*)\)\s*)?(,|$)")


@dataclass(frozen=True)
class MeasureChoice:
    """Hold a measure's name in the registry, and the options that the user gave."""

    name: str
    options: Mapping[str, Any]

    @property
    def measure(self) -> Measure:
        """Return the measure of that name."""
        return MEASURES[self.name]

    @property
    def label(self) -> str:
        """Return the measure as a user would write it: `mutual_knn(k=5)`."""
        written = ",".join(f"{name}={_written(value)}" for name, value in self.options.items())
        return f"{self.name}({written})" if written else self.name

    @property
    def slug(self) -> str:
        """Return the label in a form for file names: `mutual_knn-k-5`."""
        pairs = [f"-{name}-{_written(value)}" for name, value in self.options.items()]
        return self.name + "".join(pairs)


def parse_measures(text: str) -> tuple[MeasureChoice, ...]:
    """Parse the measures in `text`; `all` stands for the entire registry.

    Raises InputError for text that is no such list, an unknown name or option, a value that the
    option does not accept, and a measure given twice.
    """
    if text.strip() == "all":
        return tuple(MeasureChoice(name, {}) for name in MEASURES)
    choices: list[MeasureChoice] = []
    place, separator = 0, ","
    while separator:
        item = _ITEM.match(text, place)
        if item is None:
            raise InputError(
                f"cannot read the measures {shown(text)}: write names with commas between, options "
                "in parentheses, such as cka,mutual_knn(k=5)"
            )
        name, options, separator = item.groups()
        find_measure(name)
        name = ALIASES.get(name, name)
        choices.append(MeasureChoice(name, _options(name, options or "")))
        place = item.end()
    labels = [one.label for one in choices]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"the measure {twice[0]} is given twice: name it once")
    return tuple(choices)


def _options(name: str, text: str) -> dict[str, Any]:
    """Parse the options `k=5,normalize=false` of a measure, in the order of its signature."""
    known = dict(list(inspect.signature(MEASURES[name].function).parameters.items())[2:])
    takes = ", ".join(known) or "none"
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if option not in known:
            raise InputError(f"the measure {name} has no option {shown(option)}: it takes {takes}")
        if not (equals and value):
            raise InputError(f"option {option} of {name} has no value: write {name}({option}=…)")
        if option in found:
            raise InputError(f"option {option} of {name} is given twice: give it once")
        found[option] = _value(f"option {option} of {name}", value, known[option])
    try:
        check_options(found, MEASURES[name].defaults)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return {option: found[option] for option in known if option in found}


def _value(where: str, text: str, parameter: inspect.Parameter) -> Any:
    """Convert the text of an option to the type of its default."""
    if isinstance(default := parameter.default, bool):
        if text not in ("true", "false"):
            raise InputError(f"{where} is {shown(text)}: write true or false")
        return text == "true"
    if isinstance(default, str):
        choices = get_args(parameter.annotation)
        if choices and text not in choices:
            raise InputError(f"{where} is {shown(text)}: choose from {', '.join(choices)}")
        return text
    kind, noun = (int, "whole number") if isinstance(default, int) else (float, "number")
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{where} is {shown(text)}: write a {noun}") from None


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
