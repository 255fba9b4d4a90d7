"""Interpret tensor names: which are no parameters, and which mean the same parameter.

A checkpoint may hold buffers that the model's code computes anyway, or names from another wrapper
class of the same model. transformers loads both, and we merge both.
"""

import re
from collections.abc import Collection

from recall_jax.checkpoint.tensors import TensorSpec

# Every loader computes these from the config, or nobody uses them. Old checkpoints hold them.
_BUFFER = re.compile(
    r"(?:^|\.)(?:"
    r"\w*inv_freq|(?:cos|sin)_cached?|cached_(?:cos|sin)|freqs_(?:cis|cos|sin)"
    r"|(?:rotary\w*|rope)\.(?!weight$|bias$)\w+"
    r"|position_ids|token_type_ids|relative_position_index"
    r"|masked_bias|causal_mask|attn_mask|attn\.embed_positions|embed_positions\.weights"
    r"|num_batches_tracked"
    r"|EncDecAttention\.relative_attention_bias\.weight"  # in T5 layers that have no such bias
    r")$"
)
# `attn.bias` of GPT-2, `attention.bias` of GPT-NeoX: a parameter's name with another shape.
_MASK = re.compile(r"(?:^|\.)(?:\w*attn|\w*attention)\.bias$")
_BARE_DECODER = {"embed_tokens", "layers", "norm"}


def is_buffer(name: str, spec: TensorSpec) -> bool:
    """Return whether a tensor is no parameter: an attention mask, position ids, a rotary cache.

    No model needs it stored, and its values say nothing about the model.
    """
    if _MASK.search(name):
        return len(spec.shape) == 4 and spec.shape[:2] == (1, 1) and spec.shape[2] == spec.shape[3]
    return _BUFFER.search(name) is not None


def decoder_prefixes(names: Collection[str]) -> dict[str, str]:
    """Rename the tensors of a decoder saved without its output head as in the full model.

    AutoModel calls `layers.0` what AutoModelForCausalLM calls `model.layers.0`; each loads what the
    other saved. Returns an empty mapping for any other model.
    """
    if {name.partition(".")[0] for name in names} != _BARE_DECODER:
        return {}
    return {name: f"model.{name}" for name in names}


def match_names(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Map those of `names` that mean a tensor of `others` to its name there.

    The two may differ by one prefix, such as `model.` or `transformer.`; the prefix, or none, that
    matches most names is used.
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
