"""What the names of a checkpoint's tensors tell: which are no parameters, which mean the same.

A checkpoint may have been saved with buffers that its code computes anyway, and under the names of
another wrapper of the same model; transformers loads it all the same, and so is it merged.
"""

import re
from collections.abc import Collection

from recall_jax.checkpoint.tensors import TensorSpec

# Computed from the config by every loader, or counted for nobody. Old checkpoints hold them.
_BUFFER = re.compile(
    r"(?:^|\.)(?:"
    r"\w*inv_freq|(?:cos|sin)_cached?|cached_(?:cos|sin)|freqs_(?:cis|cos|sin)"
    r"|(?:rotary\w*|rope)\.(?!weight$|bias$)\w+"
    r"|position_ids|token_type_ids|relative_position_index"
    r"|masked_bias|causal_mask|attn_mask|attn\.embed_positions|embed_positions\.weights"
    r"|num_batches_tracked"
    r"|EncDecAttention\.relative_attention_bias\.weight"  # of T5, of layers that have no such bias
    r")$"
)
# `attn.bias` of GPT-2, `attention.bias` of GPT-NeoX: as a parameter's, but of another shape.
_MASK = re.compile(r"(?:^|\.)(?:\w*attn|\w*attention)\.bias$")
_BARE_DECODER = {"embed_tokens", "layers", "norm"}


def is_buffer(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor carries no parameter: an attention mask, position ids, a rotary cache.

    No model needs it stored, and what it holds says nothing of the model.
    """
    if _MASK.search(name):
        return len(spec.shape) == 4 and spec.shape[:2] == (1, 1) and spec.shape[2] == spec.shape[3]
    return _BUFFER.search(name) is not None


def with_prefix(names: Collection[str]) -> dict[str, str]:
    """The names that a decoder saved without its output head has within the model with one.

    AutoModel calls `layers.0` what AutoModelForCausalLM calls `model.layers.0`, and each loads what
    the other saved. Empty for all other models.
    """
    if {name.partition(".")[0] for name in names} != _BARE_DECODER:
        return {}
    return {name: f"model.{name}" for name in names}


def namesakes(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """For those of `names` that mean a tensor of `others`, its name there.

    The two may differ by one prefix, such as `model.` or `transformer.`: the one, or none, by which
    most fit.
    """
    best = {name: name for name in names if name in others}
    if len(best) == len(names):
        return best
    firsts = (name.partition(".")[0] + "." for name in (*names, *others))
    for prefix in dict.fromkeys(firsts):
        bare = {name.removeprefix(prefix): name for name in others}
        fits = {name: bare.get(name.removeprefix(prefix)) for name in names}
        found = {name: other for name, other in fits.items() if other is not None}
        if len(found) > len(best) and len(set(found.values())) == len(found):
            best = found
    return best
