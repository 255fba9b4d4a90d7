"""Read Qwen3: Llama with RMSNorm on each query and key head, and optional window layers."""

from recall_jax.models.architecture import Architecture
from recall_jax.models.attributes import Attributes
from recall_jax.models.families.family import LLAMA_TENSORS, Family
from recall_jax.models.families.shared import read_layer_windows, read_shared


def architecture(config: Attributes) -> Architecture:
    """Read the config with the defaults of `transformers.Qwen3Config`.

    attention_bias applies to all four projections.
    """
    attention_bias = config.flag("attention_bias", False)
    shared = read_shared(
        config,
        vocab_size=151_936,
        intermediate_size=22_016,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=32_768,
    )
    return Architecture(
        family="qwen3",
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=False,
        qk_norm=True,
        windows=read_layer_windows(config, shared["num_hidden_layers"]),
        **shared,
    )


QWEN3 = Family("qwen3", architecture, LLAMA_TENSORS)
