"""Match patterns with the leaves of a JAX tree: which are the embedding, and which the layers.

A leaf's name is its path, such as `decoder/layers/mlp/kernel`. In a pattern `*` matches any part of
a word, `**` any number of words, and `{i}` the number of a layer.
"""

import re
from typing import Annotated, Any

from pydantic import Field, Strict, field_validator, model_validator

from recall_jax.errors import shown
from recall_jax.files.schema import Schema

LAYER_NUMBER = "{i}"
_WILD = ("*", "**", "**/")
_PART = re.compile(r"^\*\*$|/\*\*$|\*\*/|\*|\{i\}|(?:(?!/\*\*$)[^*{])+")
_WORD = re.compile(r"\*\*|(?:[^/*{}]|\*(?!\*)|\{i\})+")


class TreePatterns(Schema):
    """Define the units of a JAX tree by patterns for its leaves' names.

    `root` is the path to the parameters; patterns are relative to it, and leaves outside are not
    merged. A pattern in `layers` either contains the layer's number, `{i}`, or names leaves that
    stack the layers on `axis`; several such patterns follow each other in depth. Leaves that match
    no pattern belong to the head.
    """

    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    embed: tuple[str, ...] = ()
    root: str | None = None
    axis: Annotated[int, Strict()] | None = None

    @field_validator("layers", "embed", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _well_formed(self) -> "TreePatterns":
        for pattern in (*self.embed, *self.layers, *([] if self.root is None else [self.root])):
            if not all(_WORD.fullmatch(word) for word in pattern.split("/")):
                raise ValueError(
                    f"pattern {shown(pattern)} is not a path: words with * in them, {LAYER_NUMBER} "
                    "or ** between slashes, none at the ends"
                )
        fixed = [*self.embed, *([] if self.root is None else [self.root])]
        if wrong := [pattern for pattern in fixed if LAYER_NUMBER in pattern]:
            raise ValueError(f"{LAYER_NUMBER} is for layers, not for {shown(wrong[0])}")
        if self.root is not None and "*" in self.root:
            raise ValueError(f"root {shown(self.root)} must be one path, without *")
        for pattern in self.layers:
            numbers = pattern.count(LAYER_NUMBER)
            if numbers > 1:
                raise ValueError(f"layers: {shown(pattern)} has {LAYER_NUMBER} more than once")
            if numbers and self.axis is not None:
                raise ValueError(
                    f"layers: {shown(pattern)} numbers its layers, and stacks none: remove axis"
                )
            if not numbers and self.axis is None:
                raise ValueError(
                    f"layers: {shown(pattern)} has no {LAYER_NUMBER}: write it where the layer's "
                    "number stands, or give the axis on which the leaves stack the layers"
                )
        return self


def match_leaf(pattern: str, name: str) -> str | None:
    """Return the layer number in a leaf's name that matches, "" if it has none; None if no match.

    `a/**` also matches `a`, if that is a leaf. Of several possible matches, the earlier parts of
    the pattern are as long as possible, but a number is complete: in `layer_12`, `*{i}` gives 12.
    The time is proportional to the length of the pattern times that of the name.
    """
    parts = _PART.findall(pattern)
    fits = [False] * len(name) + [True]  # whether the parts after this one can match from here
    rows: list[list[int | None]] = []
    for index in reversed(range(len(parts))):
        after_star = index > 0 and parts[index - 1] in _WILD
        rows.insert(0, _ends(parts[index], name, fits, after_star))
        fits = [end is not None for end in rows[0]]
    place, number = 0, ""
    for part, row in zip(parts, rows, strict=True):
        end = row[place]
        if end is None:  # only for the first part: it is checked that the rest can match
            return None
        if part == LAYER_NUMBER:
            number = name[place:end]
        place = end
    return number


def _ends(part: str, name: str, fits: list[bool], after_star: bool) -> list[int | None]:
    """Return the last position where a part of a pattern ends, by its start; None if none."""
    ends: list[int | None] = [None] * len(fits)
    for start in reversed(range(len(fits))):
        rest = name[start : start + 1]
        if part in _WILD:
            step = start + 1
            if part == "**/":
                step = name.find("/", start) + 1
                goes_on = step > start + 1
            else:
                goes_on = bool(rest) and (part == "**" or rest != "/")
            further = ends[step] if goes_on else None
            ends[start] = start if further is None and fits[start] else further
        elif part == LAYER_NUMBER:
            if rest.isdecimal():
                further = ends[start + 1]
                ends[start] = start + 1 if further is None and fits[start + 1] else further
        elif part == "/**":
            ends[start] = len(name) if rest in ("", "/") else None
        elif name.startswith(part, start) and fits[start + len(part)]:
            ends[start] = start + len(part)
    if part == LAYER_NUMBER and after_star:  # the star would take its first digits
        for start in range(1, len(name)):
            if name[start - 1].isdecimal():
                ends[start] = None
    return ends
