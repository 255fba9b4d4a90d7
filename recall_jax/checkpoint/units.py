"""Name the units of a model, by which models are compared and merged.

A model of L layers has U = L + 2 units: `embed`, `layers.0` … `layers.{L-1}`, `head` (final norm
and output projection).
"""

import re
from collections.abc import Iterable

EMBED = "embed"
HEAD = "head"
LM_HEAD = "lm_head.weight"

_LAYER = re.compile(r"((?:^|.*?\.)(?:h|\w*layers?|\w*blocks?))\.(\d{1,9})\.")
# Matched before embeddings, whose pattern would match some of these.
_OUTPUT = re.compile(
    r"(?:^|\.)(?:head|lm_head|embed_out|unembed\w*|output\w*|score|classifier)\.", re.IGNORECASE
)
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:\w*embed\w*|wte|wpe|shared|cls_token|project_in)(?:\.|$)", re.IGNORECASE
)


def layer_unit(index: int) -> str:
    """Return the unit name of transformer block `index` (zero-based)."""
    return f"layers.{index}"


def unit_names(num_hidden_layers: int) -> tuple[str, ...]:
    """Return the names of the U = num_hidden_layers + 2 units, in the order of the forward pass."""
    return (EMBED, *(layer_unit(index) for index in range(num_hidden_layers)), HEAD)


def unit_of_tensor(name: str) -> str:
    """Return the unit of a tensor by its Hugging Face name, for any model with numbered layers.

    The first layer number in a name decides; the input embedding with its norms and projections
    belongs to `embed`, everything else to `head`.
    """
    if match := _LAYER.match(name):
        return layer_unit(int(match.group(2)))
    return EMBED if _EMBEDDING.search(name) and not _OUTPUT.search(name) else HEAD


def stacks_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the stacks of numbered layers among tensor names, by the prefix of the number.

    A decoder has one stack. An encoder or a vision tower in the same model is another, whose layers
    share the numbers and so the units.
    """
    found = (match.group(1) for name in names if (match := _LAYER.match(name)))
    return tuple(dict.fromkeys(found))
