"""Read Mistral: Llama without biases, with the same sliding window in every layer, or none."""

from recall_jax.models.architecture import Architecture
from recall_jax.models.attributes import Attributes
from recall_jax.models.families.family import LLAMA_TENSORS, Family
from recall_jax.models.families.shared import read_shared


def architecture(config: Attributes) -> Architecture:
    """Read the config with the defaults of `transformers.MistralConfig`."""
    shared = read_shared(
        config,
        vocab_size=32_000,
        intermediate_size=14_336,
        num_key_value_heads=8,
        head_dim=None,
        max_position_embeddings=131_072,
    )
    return Architecture(
        family="mistral",
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=(config.integer("sliding_window", 4096, null=True),) * shared["num_hidden_layers"],
        **shared,
    )


MISTRAL = Family("mistral", architecture, LLAMA_TENSORS)
