"""Define a family, and the tensor names that Llama and its descendants share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from recall_jax.checkpoint.units import EMBED, HEAD
from recall_jax.models.architecture import LAYERS, Architecture
from recall_jax.models.attributes import Attributes


@dataclass(frozen=True)
class Family:
    """Describe one `model_type`: how to read its config, and the names of its tensors."""

    model_type: str
    architecture: Callable[[Attributes], Architecture]
    tensors: Mapping[str, Mapping[str, str]]


LLAMA_TENSORS: Mapping[str, Mapping[str, str]] = {
    EMBED: {"model.embed_tokens.weight": "embedding"},
    LAYERS: {
        "input_layernorm.weight": "input_layernorm/scale",
        "self_attn.q_proj.weight": "self_attn/q_proj/kernel",
        "self_attn.q_proj.bias": "self_attn/q_proj/bias",
        "self_attn.k_proj.weight": "self_attn/k_proj/kernel",
        "self_attn.k_proj.bias": "self_attn/k_proj/bias",
        "self_attn.v_proj.weight": "self_attn/v_proj/kernel",
        "self_attn.v_proj.bias": "self_attn/v_proj/bias",
        "self_attn.o_proj.weight": "self_attn/o_proj/kernel",
        "self_attn.o_proj.bias": "self_attn/o_proj/bias",
        "self_attn.q_norm.weight": "self_attn/q_norm/scale",
        "self_attn.k_norm.weight": "self_attn/k_norm/scale",
        "post_attention_layernorm.weight": "post_attention_layernorm/scale",
        "mlp.gate_proj.weight": "mlp/gate_proj/kernel",
        "mlp.gate_proj.bias": "mlp/gate_proj/bias",
        "mlp.up_proj.weight": "mlp/up_proj/kernel",
        "mlp.up_proj.bias": "mlp/up_proj/bias",
        "mlp.down_proj.weight": "mlp/down_proj/kernel",
        "mlp.down_proj.bias": "mlp/down_proj/bias",
    },
    HEAD: {"model.norm.weight": "norm/scale", "lm_head.weight": "lm_head/kernel"},
}
"""Hugging Face name -> Flax path of every parameter that any of the four families may have.

Names in a layer follow "model.layers.N.". A path that ends in "kernel" is the transpose; all others
are the tensor unchanged. The `Architecture` of a model decides which of them it has.
"""
