"""Units: the pieces in which a model is compared and merged.

A model of L layers has U = L + 2 units: `embed`, `layers.0` … `layers.{L-1}`, `head` (final norm
and output projection).
"""

import re
from collections.abc import Iterable

EMBED = "embed"
HEAD = "head"
LM_HEAD = "lm_head.weight"

_LAYER = re.compile(r"((?:^|.*?\.)(?:h|\w*layers?|\w*blocks?))\.(\d{1,9})\.")
# Before embeddings, among whose names some of these would be.
_OUTPUT = re.compile(
    r"(?:^|\.)(?:head|lm_head|embed_out|unembed\w*|output\w*|score|classifier)\.", re.IGNORECASE
)
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:\w*embed\w*|wte|wpe|shared|cls_token|project_in)(?:\.|$)", re.IGNORECASE
)


def layer_unit(index: int) -> str:
    """Name of the unit of transformer block `index` (zero-based)."""
    return f"layers.{index}"


def unit_names(num_hidden_layers: int) -> tuple[str, ...]:
    """Names of the U = num_hidden_layers + 2 units, in the order of the forward pass."""
    return (EMBED, *(layer_unit(index) for index in range(num_hidden_layers)), HEAD)


def unit_of_tensor(name: str) -> str:
    """Unit of a tensor by its Hugging Face name, for any model that numbers its layers.

    A name with a layer number belongs to the layer of the first such number, the input's embedding
    with its norms and projections to `embed`, all else to `head`.
    """
    if match := _LAYER.match(name):
        return layer_unit(int(match.group(2)))
    return EMBED if _EMBEDDING.search(name) and not _OUTPUT.search(name) else HEAD


def stacks_of(names: Iterable[str]) -> tuple[str, ...]:
    """The stacks of numbered layers among tensors' names, by what stands before the number.

    One in a decoder; an encoder or a vision tower beside it is another, whose layers have the same
    numbers and so the same units.
    """
    found = (match.group(1) for name in names if (match := _LAYER.match(name)))
    return tuple(dict.fromkeys(found))
