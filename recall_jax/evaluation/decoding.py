"""Greedy decoding of a resident model."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from recall_jax.models.architecture import Architecture
from recall_jax.models.forward import forward, logits
from recall_jax.representations.batches import make_batches

Array = jax.Array


def greedy_decode(
    arch: Architecture,
    tree: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    batch_size: int,
    dtype: DTypeLike = jnp.float32,
) -> list[list[int]]:
    """The likeliest next token, again and again: the new tokens of each prompt.

    A row ends before the first of `eos_token_ids`, which is left out, or after `max_new_tokens`.
    `tree` has its layers stacked; the forward runs in `dtype`. One program for each padded length
    of the prompts, which models of one architecture share.
    """
    batches = make_batches(prompts, batch_size)
    tree, ends = jax.device_put((tree, np.asarray(eos_token_ids, np.int32)))
    completions: list[list[int]] = []
    for batch in batches.batches:
        tokens, counts = _decode(arch, max_new_tokens, dtype, tree, *batch, ends)
        completions += [
            row[:count].tolist()
            for row, count in zip(np.asarray(tokens), np.asarray(counts), strict=True)
        ]
    return [completions[place] for place in batches.order]


@partial(jax.jit, static_argnames=("arch", "max_new_tokens", "dtype"))
def _decode(
    arch: Architecture,
    max_new_tokens: int,
    dtype: DTypeLike,
    tree: dict[str, Any],
    input_ids: Array,
    attention_mask: Array,
    eos_token_ids: Array,
) -> tuple[Array, Array]:
    """Prompts (B, T) to (new tokens (B, max_new_tokens), their number in each row (B,)).

    Every step runs the whole rows so far again. Empty rows, which only fill a batch, stay empty.
    """
    prompt_lengths = attention_mask.sum(axis=1)
    input_ids = jnp.pad(input_ids, ((0, 0), (0, max_new_tokens)))
    places = jnp.arange(input_ids.shape[1])[None, :]

    def unfinished(state: tuple[Array, Array, Array, Array]) -> Array:
        step, _, _, done = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def extend(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        step, ids, lengths, done = state
        mask = (places < lengths[:, None]).astype(jnp.int32)
        _, normed = forward(arch, tree, ids, mask, observe=lambda _: (), dtype=dtype)
        last = jnp.take_along_axis(normed, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
        token = jnp.argmax(logits(arch, tree, last)[:, 0], axis=-1).astype(ids.dtype)
        done = done | jnp.isin(token, eos_token_ids)
        is_new = (places == lengths[:, None]) & ~done[:, None]
        ids = jnp.where(is_new, token[:, None], ids)
        return step + 1, ids, jnp.where(done, lengths, lengths + 1), done

    start = (jnp.int32(0), input_ids, prompt_lengths, prompt_lengths == 0)
    _, ids, lengths, _ = jax.lax.while_loop(unfinished, extend, start)
    new = prompt_lengths[:, None] + jnp.arange(max_new_tokens)[None, :]
    return jnp.take_along_axis(ids, new, axis=1), lengths - prompt_lengths
