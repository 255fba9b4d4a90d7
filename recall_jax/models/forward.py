"""Run the forward pass as pure functions of (architecture, parameters, inputs).

A block called by itself and the same block inside the scan of `forward` are one computation, so the
streamed and the resident engine see the same hidden states. `arch` is static under `jax.jit`.
"""

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding

from recall_jax.checkpoint.units import EMBED, HEAD
from recall_jax.models.architecture import LAYERS, Architecture
from recall_jax.models.decoder import SAME_INPUTS, Block, Context, Embed, Head
from recall_jax.models.lora import LoraSpec
from recall_jax.models.rope import cos_sin

Array = jax.Array
Params = dict[str, Any]

FULL_ATTENTION = np.iinfo(np.int32).max


def attention_windows(arch: Architecture) -> np.ndarray:
    """Return the `window` of each layer's `block`, int32 (L,); full attention is FULL_ATTENTION."""
    return np.asarray([window or FULL_ATTENTION for window in arch.windows], np.int32)


def context(arch: Architecture, attention_mask: Array, positions: Array | None = None) -> Context:
    """Compute what the blocks need of a batch, once for all of them.

    attention_mask (B, T) is non-zero on tokens, padded on either side. positions (B, T) default to
    0 … T-1 in every row, as in transformers.
    """
    chex.assert_rank(attention_mask, 2)
    is_token = attention_mask != 0
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(is_token.shape[1])[None, :], is_token.shape)
    chex.assert_equal_shape([positions, is_token])
    cos, sin = cos_sin(arch, positions, lengths=is_token.sum(axis=1))
    return Context(cos=cos, sin=sin, is_token=is_token)


def embed(arch: Architecture, params: Params, input_ids: Array, dtype: Any = jnp.float32) -> Array:
    """Run unit `embed`: ids (B, T) to hidden states (B, T, E) in the compute dtype."""
    chex.assert_rank(input_ids, 2)
    return Embed(arch, dtype).apply({"params": params}, input_ids)


def block(
    arch: Architecture,
    params: Params,
    hidden: Array,
    context: Context,
    window: Array | int,
    *,
    lora: Params | None = None,
    lora_spec: LoraSpec | None = None,
    dropout_key: Array | None = None,
) -> Array:
    """Run unit `layers.i`: hidden states (B, T, E) to the block's raw output, in the same dtype.

    `window` is this layer's entry of `attention_windows`, `lora` its low-rank factors; the other
    arguments are as in `forward`.
    """
    chex.assert_shape(hidden, (*context.is_token.shape, arch.hidden_size))
    variables = {"params": params} if lora is None else {"params": params, "lora": lora}
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    module = Block(arch, hidden.dtype, lora_spec)
    return module.apply(variables, hidden, context, window, rngs=rngs)


def block_with_inputs(
    arch: Architecture, params: Params, hidden: Array, context: Context, window: Array | int
) -> tuple[Array, dict[str, Array]]:
    """Run `block`, and return also the input (B, T, in) of each linear layer, by path.

    Layers with the same input appear once, under the path given by `decoder.SAME_INPUTS`.
    """
    chex.assert_shape(hidden, (*context.is_token.shape, arch.hidden_size))
    module = Block(arch, hidden.dtype)
    after, seen = module.apply(
        {"params": params}, hidden, context, window, mutable=["intermediates"]
    )
    inputs = {
        path.removesuffix("/inputs"): values[0]
        for path, values in flatten_dict(seen["intermediates"], sep="/").items()
    }
    return after, {path: states for path, states in inputs.items() if path not in SAME_INPUTS}


def head(arch: Architecture, params: Params, hidden: Array) -> Array:
    """Run unit `head`: the last block's output (B, T, E) to the final norm's.

    `params` need only have the norm.
    """
    return Head(arch, hidden.dtype).apply({"params": params}, hidden)


def logits(arch: Architecture, tree: Params, normed: Array) -> Array:
    """Map the final norm's output (B, T, E) to float32 logits (B, T, V), tied or not."""
    if arch.tie_word_embeddings:
        unit, method = Embed(arch, normed.dtype), Embed.attend
        scores = unit.apply({"params": tree[EMBED]}, normed, method=method)
    else:
        unit, method = Head(arch, normed.dtype), Head.logits
        scores = unit.apply({"params": tree[HEAD]}, normed, method=method)
    return scores.astype(jnp.float32)


def forward(
    arch: Architecture,
    tree: Params,
    input_ids: Array,
    attention_mask: Array,
    *,
    observe: Callable[[Array], Any] = lambda hidden: hidden,
    dtype: Any = jnp.float32,
    remat: bool = False,
    lora: Params | None = None,
    lora_spec: LoraSpec | None = None,
    dropout_key: Array | None = None,
    rows: NamedSharding | None = None,
) -> tuple[tuple[Any, ...], Array]:
    """Run all units: (`observe` of each of the U outputs, final norm's output (B, T, E)).

    `tree` has its layers stacked on axis 0. `observe` maps (B, T, E) to any pytree and runs inside
    the scan over layers; one that pools keeps the hidden states of only one unit in memory at a
    time. With `remat`, a backward pass keeps only the blocks' inputs and runs each block again.

    `lora` has the low-rank factors of an adapter, {"layers": {path of a linear layer: {"a" (L, in,
    r), "b" (L, r, out)}}}, and `lora_spec` their scale; without `dropout_key` nothing is dropped.

    On a mesh, `rows` is the sharding of the hidden states (B, T, E). Raises ValueError for `lora`
    without `lora_spec`, or the reverse.
    """
    chex.assert_equal_shape([input_ids, attention_mask])
    if (lora is None) != (lora_spec is None):
        raise ValueError("lora and lora_spec go together")
    batch = context(arch, attention_mask)
    hidden = embed(arch, tree[EMBED], input_ids, dtype)
    if rows is not None:  # else XLA shards them like the embedding, with all rows on every device
        hidden = jax.lax.with_sharding_constraint(hidden, rows)
    first = observe(hidden)

    windows = jnp.asarray(attention_windows(arch))
    factors = None if lora is None else lora[LAYERS]
    keys = None if dropout_key is None else jax.random.split(dropout_key, arch.num_hidden_layers)

    def step(hidden: Array, layer: tuple[Any, ...]) -> tuple[Array, Any]:
        params, window, factors, key = layer
        adapter = {"lora": factors, "lora_spec": lora_spec, "dropout_key": key}
        hidden = block(arch, params, hidden, batch, window, **adapter)
        return hidden, observe(hidden)

    if remat:
        step = jax.checkpoint(step, prevent_cse=False)  # the scan itself prevents it
    hidden, inner = jax.lax.scan(step, hidden, (tree[LAYERS], windows, factors, keys))
    normed = head(arch, tree[HEAD], hidden)
    layers = (jax.tree.map(itemgetter(i), inner) for i in range(arch.num_hidden_layers))
    return (first, *layers, observe(normed)), normed


@functools.partial(jax.jit, static_argnames=("arch", "dtype"))
def init_params(arch: Architecture, key: Array, dtype: Any = jnp.float32) -> Params:
    """Return random parameters as laid out by `convert.to_flax`.

    Weights are normal(0.02), norms one, biases zero.
    """
    keys = jax.random.split(key, arch.num_hidden_layers + 2)
    ids = jnp.zeros((1, 1), jnp.int32)
    hidden = jnp.zeros((1, 1, arch.hidden_size))
    batch = context(arch, ids)

    def layer(key: Array) -> Params:
        return Block(arch).init(key, hidden, batch, FULL_ATTENTION)["params"]

    def full_head(module: Head, hidden: Array) -> Array:
        normed = module(hidden)
        return normed if arch.tie_word_embeddings else module.logits(normed)

    tree = {
        EMBED: Embed(arch).init(keys[0], ids)["params"],
        LAYERS: jax.vmap(layer)(keys[1:-1]),
        HEAD: Head(arch).init(keys[-1], hidden, method=full_head)["params"],
    }
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
