"""Read Llama 1 to 3, and the many checkpoints with the same model_type."""

from recall_jax.models.architecture import Architecture
from recall_jax.models.attributes import Attributes
from recall_jax.models.families.family import LLAMA_TENSORS, Family
from recall_jax.models.families.shared import read_shared


def architecture(config: Attributes) -> Architecture:
    """Read the config with the defaults of `transformers.LlamaConfig`.

    attention_bias applies to all four projections.
    """
    attention_bias = config.flag("attention_bias", False)
    shared = read_shared(
        config,
        vocab_size=32_000,
        intermediate_size=11_008,
        num_key_value_heads=None,
        head_dim=None,
        max_position_embeddings=2048,
    )
    return Architecture(
        family="llama",
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
        qk_norm=False,
        windows=(None,) * shared["num_hidden_layers"],
        **shared,
    )


LLAMA = Family("llama", architecture, LLAMA_TENSORS)
