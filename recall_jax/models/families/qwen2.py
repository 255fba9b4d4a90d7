"""Read Qwen2 and Qwen2.5: Llama with biases on query, key and value, and optional window layers."""

from recall_jax.models.architecture import Architecture
from recall_jax.models.attributes import Attributes
from recall_jax.models.families.family import LLAMA_TENSORS, Family
from recall_jax.models.families.shared import read_layer_windows, read_shared


def architecture(config: Attributes) -> Architecture:
    """Read the config with the defaults of `transformers.Qwen2Config`."""
    shared = read_shared(
        config,
        vocab_size=151_936,
        intermediate_size=22_016,
        num_key_value_heads=32,
        head_dim=None,
        max_position_embeddings=32_768,
    )
    return Architecture(
        family="qwen2",
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=read_layer_windows(config, shared["num_hidden_layers"]),
        **shared,
    )


QWEN2 = Family("qwen2", architecture, LLAMA_TENSORS)
