"""What a family is, and what Llama and its descendants have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from recall_jax.models.architecture import Architecture
from recall_jax.models.config import ACTIVATIONS, Config, read_rope
from recall_jax.units import EMBED, HEAD

LAYERS = "layers"

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
are the tensor as it is. Which of them a model has, its `Architecture` says.
"""


@dataclass(frozen=True)
class Family:
    """One `model_type`: how its config becomes an Architecture, and what its tensors are called."""

    model_type: str
    architecture: Callable[[Config], Architecture]
    tensors: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: LLAMA_TENSORS)


def read_shared(
    config: Config,
    *,
    vocab_size: int,
    intermediate_size: int,
    num_key_value_heads: int | None,
    head_dim: int | None,
    max_position_embeddings: int,
) -> dict[str, Any]:
    """Fields of `Architecture` that every family reads alike.

    The keywords are the defaults of the family's class in transformers, where they differ; None is
    as many key-value heads as heads, and hidden_size / num_attention_heads for head_dim.
    """
    hidden_size = config.integer("hidden_size", 4096)
    heads = config.integer("num_attention_heads", 32)
    key_value_heads = config.integer("num_key_value_heads", num_key_value_heads, null=True) or heads
    if heads % key_value_heads:
        raise config.error("num_key_value_heads", key_value_heads, f"a divisor of {heads} heads")
    head_dim = config.integer("head_dim", head_dim)
    if head_dim is None:
        if hidden_size % heads:
            raise config.error("num_attention_heads", heads, f"a divisor of {hidden_size}")
        head_dim = hidden_size // heads
    rope = read_rope(config, max_position_embeddings)
    if head_dim % 2 or (rope.kind == "dynamic" and head_dim == 2):
        raise config.error("head_dim", head_dim, "even, and above 2 with dynamic rope scaling")
    return {
        "vocab_size": config.integer("vocab_size", vocab_size),
        "hidden_size": hidden_size,
        "intermediate_size": config.integer("intermediate_size", intermediate_size),
        "num_hidden_layers": config.integer("num_hidden_layers", 32),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "rms_norm_eps": config.number("rms_norm_eps", 1e-6),
        "hidden_act": config.choice("hidden_act", ACTIVATIONS, "silu"),
        "tie_word_embeddings": config.flag("tie_word_embeddings", False),
        "rope": rope,
    }


def read_layer_windows(config: Config, num_hidden_layers: int) -> tuple[int | None, ...]:
    """Windows of the Qwen families, from `layer_types` (v5) or `max_window_layers` (v4)."""
    used = config.flag("use_sliding_window", False)
    window = config.integer("sliding_window", 4096, null=True)
    first = config.integer("max_window_layers", 28, minimum=0)
    kinds = config.words("layer_types")
    if kinds is None:
        return tuple(window if used and i >= first else None for i in range(num_hidden_layers))
    if len(kinds) != num_hidden_layers or not {*kinds} <= {"full_attention", "sliding_attention"}:
        what = f"{num_hidden_layers} times full_attention or sliding_attention"
        raise config.error("layer_types", kinds, what)
    if "sliding_attention" in kinds and not (used and window):
        raise config.error("use_sliding_window", used, "true, as layer_types has sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
