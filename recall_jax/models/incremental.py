"""Run the forward pass on a few tokens at a time, with a cache of those before them."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from recall_jax.checkpoint.units import EMBED, HEAD
from recall_jax.models.architecture import LAYERS, Architecture
from recall_jax.models.cache import Cache, empty_cache
from recall_jax.models.decoder import Block, Context
from recall_jax.models.forward import attention_windows, embed, head
from recall_jax.models.rope import cos_sin

Array = jax.Array
Params = dict[str, Any]


def prefill(
    arch: Architecture,
    tree: Params,
    input_ids: Array,
    attention_mask: Array,
    capacity: int,
    dtype: Any = jnp.float32,
) -> tuple[Array, Cache]:
    """Read prompts (B, T): (final norm's output (B, E) of the last tokens, cache).

    Rows may be padded on either side; `capacity` counts T and the tokens to come. Positions count
    the tokens of each row from 0. The output of a row without tokens is meaningless.
    """
    is_token = attention_mask != 0
    lengths = is_token.sum(axis=1, dtype=jnp.int32)
    padding = is_token.shape[1] - lengths
    # Stable: padding first, then the tokens in order, so that all rows end in the same slot.
    order = jnp.argsort(is_token, axis=1, stable=True)
    input_ids = jnp.take_along_axis(input_ids, order, axis=1)
    normed, cache = extend(arch, tree, input_ids, empty_cache(arch, padding, capacity, dtype))
    return normed[:, -1], cache


def extend(arch: Architecture, tree: Params, input_ids: Array, cache: Cache) -> tuple[Array, Cache]:
    """Read the next tokens (B, t) of each row: (final norm's output (B, t, E), cache).

    With dynamic rope scaling, the frequencies are those of a row's length after these tokens;
    earlier keys keep the frequencies they were rotated by, as in transformers. The caller must
    leave t free slots.
    """
    tokens = input_ids.shape[1]
    places = cache.length + jnp.arange(tokens, dtype=jnp.int32)
    positions = jnp.maximum(places[None, :] - cache.padding[:, None], 0)
    lengths = cache.length + tokens - cache.padding
    cos, sin = cos_sin(arch, positions, lengths)
    context = Context(cos=cos, sin=sin, is_token=cache.is_token)
    dtype = cache.keys.dtype
    hidden = embed(arch, tree[EMBED], input_ids, dtype)

    def step(state: tuple[Array, Cache], layer: tuple[Params, Array]) -> tuple[Any, None]:
        (hidden, cache), (params, window) = state, layer
        variables = {"params": params, "cache": {"self_attn": {"seen": cache}}}
        hidden, after = Block(arch, dtype).apply(
            variables, hidden, context, window, mutable=["cache"]
        )
        return (hidden, after["cache"]["self_attn"]["seen"]), None

    windows = jnp.asarray(attention_windows(arch))
    # The cache is carried, not scanned over: only new slots are written, in place.
    (hidden, cache), _ = jax.lax.scan(step, (hidden, cache), (tree[LAYERS], windows))
    cache = replace(cache, length=cache.length + tokens, layer=jnp.int32(0))
    return head(arch, tree[HEAD], hidden), cache
