"""Keep the keys and values of the tokens read, so that a new token costs one token's work."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from recall_jax.models.architecture import Architecture

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Hold the keys and values of all layers in S slots, which every row of a batch fills alike.

    keys and values (L, B, S, heads, D) are in the compute dtype, keys rotated. padding (B,) int32
    is the number of slots at a row's start that hold no token; length () int32 the number of filled
    slots; layer () int32 the layer that reads and extends the cache next.
    """

    keys: Array
    values: Array
    padding: Array
    length: Array
    layer: Array

    @property
    def is_token(self) -> Array:
        """Return bool (B, S), False on padding; empty slots count as tokens to come."""
        slots = jnp.arange(self.keys.shape[2], dtype=jnp.int32)
        return slots[None, :] >= self.padding[:, None]

    def extended(self, key: Array, value: Array) -> tuple["Cache", Array, Array]:
        """Write a layer's new keys and values (B, t, heads, D) into the first free slots.

        Returns the cache, now at the next layer, and the keys and values (B, S, heads, D) of all
        slots of this one. `length` stays: it is the same for all layers of a pass.
        """
        place = (self.layer, 0, self.length, 0, 0)
        keys = jax.lax.dynamic_update_slice(self.keys, key[None], place)
        values = jax.lax.dynamic_update_slice(self.values, value[None], place)
        cache = replace(self, keys=keys, values=values, layer=self.layer + 1)
        mine = (jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for x in (keys, values))
        return cache, *mine


def empty_cache(arch: Architecture, padding: Array, capacity: int, dtype: Any) -> Cache:
    """Return a cache of `capacity` slots for rows that start with `padding` (B,) empty slots."""
    heads, head_dim = arch.num_key_value_heads, arch.head_dim
    shape = (arch.num_hidden_layers, len(padding), capacity, heads, head_dim)
    zero = jnp.int32(0)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), padding, zero, zero)
