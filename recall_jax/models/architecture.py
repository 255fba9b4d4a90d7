"""Describe what a decoder computes: every config value that affects the forward pass, no other."""

from dataclasses import dataclass

from recall_jax.checkpoint.units import unit_names

LAYERS = "layers"
"""The key of the blocks in a parameter tree, stacked on axis 0, between `embed` and `head`."""
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """Describe a rotary position embedding.

    kind is one of ROPE_KINDS; the fields below theta are those of the kind's equation in
    `rope.inverse_frequencies`, and stay at their defaults elsewhere.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """Describe a decoder-only transformer: pre-norm RMSNorm, rotary attention, gated MLP.

    Hashable, so that it can be a static argument of `jax.jit`. hidden_act is one of ACTIVATIONS;
    `windows[i]` is the number of latest tokens, itself included, that a token sees in layer i, or
    None for all of them.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    rope: Rope
    windows: tuple[int | None, ...]

    @property
    def units(self) -> tuple[str, ...]:
        """Return the names of the U = num_hidden_layers + 2 units, in forward order."""
        return unit_names(self.num_hidden_layers)
