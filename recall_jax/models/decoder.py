"""Define the three units of a decoder as Linen modules: `Embed`, `Block`, `Head`.

Parameters keep their dtype and are cast to `dtype`, the compute dtype, where they are used; RMSNorm
statistics, rotations and softmax are always float32. In float32 every product runs at the highest
precision, because the default on GPU and TPU is lower.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from recall_jax.models.architecture import Architecture
from recall_jax.models.lora import LoraSpec
from recall_jax.models.rope import apply_rope

Array = jax.Array

ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
}

QUERY_BLOCK = 128

INIT = nn.initializers.normal(0.02)

SAME_INPUTS = {
    "self_attn/k_proj": "self_attn/q_proj",
    "self_attn/v_proj": "self_attn/q_proj",
    "mlp/up_proj": "mlp/gate_proj",
}
"""Maps the path of a linear layer to that of another layer in the block with the same input."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """Hold what every block of a batch needs in addition to its hidden states.

    cos and sin (B, T, D / 2) float32 are those of the tokens' positions; is_token (B, T) bool is
    False on padding.
    """

    cos: Array
    sin: Array
    is_token: Array


class Embed(nn.Module):
    """Embed tokens; in tied models also project onto the vocabulary."""

    arch: Architecture
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the parameter that both directions use."""
        shape = (self.arch.vocab_size, self.arch.hidden_size)
        self.embedding = self.param("embedding", INIT, shape)

    def __call__(self, input_ids: Array) -> Array:
        """Map ids (B, T) to (B, T, E); an id outside the vocabulary gives NaN."""
        return jnp.take(self.embedding, input_ids, axis=0).astype(self.dtype)

    def attend(self, normed: Array) -> Array:
        """Map the final norm's output (B, T, E) to logits (B, T, V)."""
        embedding = self.embedding.astype(self.dtype)
        return jnp.einsum("bte,ve->btv", normed, embedding, precision=_precision(self.dtype))


class Block(nn.Module):
    """Apply pre-norm attention and a gated MLP, each added to the residual stream."""

    arch: Architecture
    dtype: Any = jnp.float32
    lora: LoraSpec | None = None

    @nn.compact
    def __call__(self, hidden: Array, context: Context, window: Array) -> Array:
        """Map (B, T, E) to (B, T, E); `window` is traced, so that all layers share one program."""
        arch, dtype, lora = self.arch, self.dtype, self.lora
        normed = RMSNorm(arch.rms_norm_eps, dtype, name="input_layernorm")(hidden)
        hidden = hidden + Attention(arch, dtype, lora, name="self_attn")(normed, context, window)
        normed = RMSNorm(arch.rms_norm_eps, dtype, name="post_attention_layernorm")(hidden)
        return hidden + MLP(arch, dtype, lora, name="mlp")(normed)


class Head(nn.Module):
    """Apply the final norm and, unless tied to the embedding, the output projection."""

    arch: Architecture
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare both parts, so that each can run without the other's parameters."""
        self.norm = RMSNorm(self.arch.rms_norm_eps, self.dtype)
        if not self.arch.tie_word_embeddings:
            self.lm_head = Linear(self.arch.vocab_size, False, self.dtype)

    def __call__(self, hidden: Array) -> Array:
        """Return the final norm's output (B, T, E)."""
        return self.norm(hidden)

    def logits(self, normed: Array) -> Array:
        """Map the final norm's output (B, T, E) to logits (B, T, V), for untied models."""
        return self.lm_head(normed)


class Attention(nn.Module):
    """Apply causal attention; each key-value head serves a group of adjacent query heads.

    If the variables hold a `Cache`, in the collection `cache` under `seen`, the keys and values of
    `hidden` are appended to it and queries see all its slots; `context.is_token` then refers to
    slots.
    """

    arch: Architecture
    dtype: Any = jnp.float32
    lora: LoraSpec | None = None

    @nn.compact
    def __call__(self, hidden: Array, context: Context, window: Array) -> Array:
        """Map (B, T, E) to (B, T, E)."""
        arch, dtype, lora = self.arch, self.dtype, self.lora
        batch, tokens, _ = hidden.shape
        heads, head_dim = arch.num_key_value_heads, arch.head_dim
        groups = arch.num_attention_heads // heads

        def project(name: str, *shape: int) -> Array:
            features = heads * head_dim * (groups if name == "q_proj" else 1)
            states = Linear(features, arch.qkv_bias, dtype, lora, name=name)(hidden)
            return states.reshape(batch, tokens, *shape)

        query = project("q_proj", heads, groups, head_dim)
        key = project("k_proj", heads, head_dim)
        value = project("v_proj", heads, head_dim)
        if arch.qk_norm:
            query = RMSNorm(arch.rms_norm_eps, dtype, name="q_norm")(query)
            key = RMSNorm(arch.rms_norm_eps, dtype, name="k_norm")(key)
        query = apply_rope(query, context.cos, context.sin)
        key = apply_rope(key, context.cos, context.sin)
        index = jnp.arange(tokens, dtype=jnp.int32)
        if self.has_variable("cache", "seen"):
            cache = self.get_variable("cache", "seen")
            index = cache.length + index
            cache, key, value = cache.extended(key, value)
            self.put_variable("cache", "seen", cache)

        def attend(rows: tuple[Array, Array]) -> Array:
            """Attend from queries (B, t, heads, groups, D), masked by visible keys (B, t, T)."""
            queries, visible = rows
            scores = jnp.einsum(
                "bthgd,bshd->bhgts",
                queries,
                key,
                precision=_precision(dtype),
                preferred_element_type=jnp.float32,
            )
            # The lowest finite number, not -inf: padding that sees nothing must not turn NaN.
            lowest = jnp.finfo(jnp.float32).min
            scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, lowest)
            weights = nn.softmax(scores, axis=-1).astype(dtype)
            return jnp.einsum("bhgts,bshd->bthgd", weights, value, precision=_precision(dtype))

        visible = visible_keys(index, context.is_token, window)
        if tokens > QUERY_BLOCK and tokens % QUERY_BLOCK == 0:
            # One block of queries at a time, so that no (B, heads, T, T) scores are allocated.
            blocks = (_in_blocks(query), _in_blocks(visible))
            mixed = jnp.moveaxis(jax.lax.map(attend, blocks), 0, 1)
        else:
            mixed = attend((query, visible))
        mixed = mixed.reshape(batch, tokens, arch.num_attention_heads * head_dim)
        out = Linear(arch.hidden_size, arch.output_bias, dtype, lora, name="o_proj")
        return out(mixed)


def _in_blocks(states: Array) -> Array:
    """Reshape (B, T, …) to (T / QUERY_BLOCK, B, QUERY_BLOCK, …)."""
    batch, _, *rest = states.shape
    return jnp.moveaxis(states.reshape(batch, -1, QUERY_BLOCK, *rest), 1, 0)


class MLP(nn.Module):
    """Compute down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    arch: Architecture
    dtype: Any = jnp.float32
    lora: LoraSpec | None = None

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        """Map (B, T, E) to (B, T, E)."""
        arch = self.arch

        def linear(features: int, name: str) -> Linear:
            return Linear(features, arch.mlp_bias, self.dtype, self.lora, name=name)

        gate = linear(arch.intermediate_size, "gate_proj")(hidden)
        up = linear(arch.intermediate_size, "up_proj")(hidden)
        product = ACTIVATIONS[arch.hidden_act](gate) * up
        return linear(arch.hidden_size, "down_proj")(product)


class Linear(nn.Module):
    """Compute x W + c, plus scale dropout(x) A B if the variables hold a `lora` collection.

    Hu et al. 2021 (arXiv:2106.09685), section 4.1. Without a `dropout` key there is no dropout. If
    `intermediates` are mutable, x is recorded there under `inputs`.
    """

    features: int
    use_bias: bool
    dtype: Any = jnp.float32
    lora: LoraSpec | None = None

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Map (…, in) to (…, out)."""

        def product(states: Array, matrix: Array) -> Array:
            return jnp.dot(states, matrix.astype(self.dtype), precision=_precision(self.dtype))

        inputs = inputs.astype(self.dtype)
        self.sow("intermediates", "inputs", inputs)
        outputs = product(inputs, self.param("kernel", INIT, (inputs.shape[-1], self.features)))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
            outputs += bias.reshape((1,) * (outputs.ndim - 1) + (-1,))
        if self.lora is not None and self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", factor) for factor in ("a", "b"))
            dropout = nn.Dropout(self.lora.dropout, deterministic=not self.has_rng("dropout"))
            outputs += self.lora.scale * product(product(dropout(inputs), a), b)
        return outputs


class RMSNorm(nn.Module):
    """Compute x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang and Sennrich 2019)."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, states: Array) -> Array:
        """Normalize states of any shape, with float32 statistics, and return them in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (states.shape[-1],))
        wide = states.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        scale = scale.astype(self.dtype).reshape((1,) * (states.ndim - 1) + (-1,))
        return normal.astype(self.dtype) * scale


def visible_keys(queries: Array, is_token: Array, window: Array) -> Array:
    """Return which keys (B, S) each query sees: tokens, none later, within the last `window`.

    `queries` (t,) int32 are the positions of the queries among the keys; the result is bool (B, t,
    S).
    """
    keys = jnp.arange(is_token.shape[1], dtype=jnp.int32)
    distance = queries[:, None] - keys[None, :]
    return ((distance >= 0) & (distance < window))[None] & is_token[:, None, :]


def _precision(dtype: Any) -> jax.lax.Precision:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
