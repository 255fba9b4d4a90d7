"""Units: the pieces in which a model is compared and merged.

A model of L layers has U = L + 2 units: `embed`, `layers.0` … `layers.{L-1}`, `head` (final norm
and output projection).
"""

import re

EMBED = "embed"
HEAD = "head"
LM_HEAD = "lm_head.weight"

# Recomputed from the config by every loader; old checkpoints hold them, newer ones do not.
_DERIVED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_\w+|embeddings?|wte|wpe|\w+_embeddings?)\.")


def layer_unit(index: int) -> str:
    """Name of the unit of transformer block `index` (zero-based)."""
    return f"layers.{index}"


def unit_names(num_hidden_layers: int) -> tuple[str, ...]:
    """Names of the U = num_hidden_layers + 2 units, in the order of the forward pass."""
    return (EMBED, *(layer_unit(index) for index in range(num_hidden_layers)), HEAD)


def unit_of_tensor(name: str) -> str:
    """Unit of a tensor by its Hugging Face name, for any decoder that numbers its layers.

    A name with a layer number belongs to that layer, an embedding to `embed`, all else to `head`.
    """
    if match := _LAYER.search(name):
        return layer_unit(int(match.group(1)))
    return EMBED if _EMBEDDING.search(name) else HEAD


def is_derived(name: str) -> bool:
    """Whether a tensor is a rotary buffer, which no model needs stored."""
    return _DERIVED.search(name) is not None
