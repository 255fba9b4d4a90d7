"""Patterns of the leaves of a JAX tree: which are the embedding, which the layers.

A leaf's name is its path, such as `decoder/layers/mlp/kernel`. In a pattern `*` stands for any part
of a word, `**` for any number of words, and `{i}` for the number of a layer.
"""

import re
from typing import Annotated, Any

from pydantic import Field, Strict, field_validator, model_validator

from recall_jax.schema import Schema

LAYER_NUMBER = "{i}"
_WORD = re.compile(r"\*\*|(?:[^/*{}]|\*(?!\*)|\{i\})+")


class TreePatterns(Schema):
    """The units of a JAX tree, by patterns of its leaves' names.

    `root` leads to the parameters; patterns begin there, and what lies elsewhere is not merged.
    `layers` either has the layer's number in it, `{i}`, or names leaves that stack the layers on
    `axis`; several such patterns follow each other in depth. What no pattern matches is the head.
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
                    f"pattern {pattern!r} is no path: words with * in them, {LAYER_NUMBER} or ** "
                    "between slashes, none at the ends"
                )
        fixed = [*self.embed, *([] if self.root is None else [self.root])]
        if wrong := [pattern for pattern in fixed if LAYER_NUMBER in pattern]:
            raise ValueError(f"{LAYER_NUMBER} is for layers, not for {wrong[0]!r}")
        if self.root is not None and "*" in self.root:
            raise ValueError(f"root {self.root!r} must be one path, without *")
        for pattern in self.layers:
            numbers = pattern.count(LAYER_NUMBER)
            if numbers > 1:
                raise ValueError(f"layers: {pattern!r} has {LAYER_NUMBER} more than once")
            if numbers and self.axis is not None:
                raise ValueError(
                    f"layers: {pattern!r} numbers its layers, and stacks none: remove axis"
                )
            if not numbers and self.axis is None:
                raise ValueError(
                    f"layers: {pattern!r} has no {LAYER_NUMBER}: write it where the layer's number "
                    "stands, or give the axis on which the leaves stack the layers"
                )
        return self


def pattern_regex(pattern: str) -> re.Pattern[str]:
    """What a leaf's whole name is matched with; its group 1 is the number of the layer, if any.

    `a/**` matches `a` too, where that is a leaf.
    """
    parts = re.split(r"(^\*\*$|/\*\*$|\*\*/|\*|\{i\})", pattern)
    meanings = {
        "**": ".*",
        "/**": "(?:/.*)?",
        "**/": "(?:[^/]+/)*",
        "*": "[^/]*",
        LAYER_NUMBER: r"(\d+)",
    }
    return re.compile("".join(meanings.get(part) or re.escape(part) for part in parts))
