"""Generate new tokens for each prompt, greedily or by sampling, with a key-value cache."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from recall_jax.errors import InputError
from recall_jax.generation.sampling import Sampling, choose
from recall_jax.inputs.batches import make_batches
from recall_jax.models.architecture import Architecture
from recall_jax.models.cache import Cache
from recall_jax.models.forward import logits
from recall_jax.models.incremental import extend, prefill

Array = jax.Array
Params = dict[str, Any]

STEPS_BETWEEN_STOPS = 16


class _State(NamedTuple):
    """Hold the state of a batch: tokens (B, N) so far, and their counts (B,).

    `done` (B,) marks the rows that have ended, and `is_nan` (B,) those that ended by NaN logits.
    """

    tokens: Array
    counts: Array
    done: Array
    is_nan: Array
    step: Array
    cache: Cache


def generate(
    arch: Architecture,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    batch_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
    stop: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, greedy at temperature 0, else sampled.

    `params` has its layers stacked; the forward pass runs in `dtype`. A row ends before the first
    of `eos_token_ids`, which is left out; or with the first token after which `stop` returns true
    for its new tokens, and must then do so for every continuation; or after `max_new_tokens`. top_k
    and top_p are as in `sampling.filtered`. A sample depends on `seed`, the prompt and its index in
    `prompts`, not on the batch. Models of one architecture share one program for each padded prompt
    length.

    Raises:
        InputError: for a prompt without tokens or with a token outside the vocabulary, a number out
            of range, or a model whose logits are NaN.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    sampling = Sampling(temperature, top_k, top_p)
    check_token_ids(arch, prompts, "prompt")
    batches = make_batches(prompts, batch_size)
    order = np.full(len(batches.batches) * batch_size, len(prompts))  # empty rows share a key
    order[batches.order] = np.arange(len(prompts))
    params, ends = jax.device_put((params, np.asarray(eos_token_ids, np.int32)))
    keys = _row_keys(jax.random.key(seed), order)
    completions: list[list[int]] = []
    for index, batch in enumerate(batches.batches):
        rows = keys[index * batch_size : (index + 1) * batch_size]
        choosing = (arch, sampling, params, ends, rows)
        state = _begin(*choosing, *batch, max_new_tokens, dtype)
        if stop is None:
            state = _go_on(*choosing, state, max_new_tokens)
        else:
            state = _until_stopped(choosing, state, stop)
        if np.asarray(state.is_nan).any():
            raise InputError("the model's logits are NaN: run it in float32, or repair its weights")
        completions += _completions(state)
    return [completions[place] for place in batches.order]


def check_token_ids(arch: Architecture, rows: Sequence[Sequence[int]], what: str) -> None:
    """Raise InputError for the first row that is empty or has an id outside the vocabulary."""
    for index, row in enumerate(rows):
        if len(row) == 0:
            raise InputError(f"{what} {index} (from 0) has no tokens: give it at least one")
        if not 0 <= min(row) <= max(row) < arch.vocab_size:
            raise InputError(
                f"{what} {index} (from 0) has token id {max(row)}, but the model has "
                f"{arch.vocab_size} embeddings: use the tokenizer that belongs to the model"
            )


@jax.jit
def _row_keys(key: Array, rows: Array) -> Array:
    return jax.vmap(partial(jax.random.fold_in, key))(rows)


@partial(jax.jit, static_argnames=("arch", "sampling", "max_new_tokens", "dtype"))
def _begin(
    arch: Architecture,
    sampling: Sampling,
    params: Params,
    ends: Array,
    keys: Array,
    input_ids: Array,
    attention_mask: Array,
    max_new_tokens: int,
    dtype: DTypeLike,
) -> _State:
    """Read the prompts (B, T) and choose the first token of each; rows without tokens are done."""
    batch, prompt_tokens = input_ids.shape
    capacity = prompt_tokens + max_new_tokens
    last, cache = prefill(arch, params, input_ids, attention_mask, capacity, dtype)
    state = _State(
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        counts=jnp.zeros(batch, jnp.int32),
        done=~jnp.any(attention_mask != 0, axis=1),
        is_nan=jnp.zeros(batch, bool),
        step=jnp.int32(0),
        cache=cache,
    )
    return _chosen(arch, sampling, params, ends, keys, last, state)


@partial(jax.jit, static_argnames=("arch", "sampling"), donate_argnames="state")
def _go_on(
    arch: Architecture,
    sampling: Sampling,
    params: Params,
    ends: Array,
    keys: Array,
    state: _State,
    until: Array | int,
) -> _State:
    """Choose tokens until there are `until` of them or every row is done."""

    def unfinished(state: _State) -> Array:
        return (state.step < until) & ~jnp.all(state.done)

    def extended(state: _State) -> _State:
        newest = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        normed, cache = extend(arch, params, newest, state.cache)
        state = state._replace(cache=cache)
        return _chosen(arch, sampling, params, ends, keys, normed[:, 0], state)

    return jax.lax.while_loop(unfinished, extended, state)


def _chosen(
    arch: Architecture,
    sampling: Sampling,
    params: Params,
    ends: Array,
    keys: Array,
    normed: Array,
    state: _State,
) -> _State:
    """Add the token that follows the final norm's output (B, E)."""
    scores = logits(arch, params, normed[:, None])[:, 0]
    at_step = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, state.step)
    token = choose(sampling, scores, at_step)
    is_nan = state.is_nan | (jnp.isnan(scores).any(axis=1) & ~state.done)
    done = state.done | is_nan | jnp.isin(token, ends)
    return state._replace(
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        counts=jnp.where(done, state.counts, state.counts + 1),
        done=done,
        is_nan=is_nan,
        step=state.step + 1,
    )


def _until_stopped(
    choosing: tuple[Any, ...], state: _State, stop: Callable[[list[int]], bool]
) -> _State:
    """Generate to the end, and call `stop` for every row again after some steps."""
    limit = state.tokens.shape[1]
    settled = np.zeros(len(state.done), bool)
    while True:
        counts, done = np.array(state.counts), np.array(state.done)
        for row, tokens in enumerate(_completions(state)):
            if not settled[row] and stop(tokens):
                counts[row] = bisect_left(range(len(tokens)), True, key=lambda n: stop(tokens[:n]))
                done[row] = True
        settled = done
        state = state._replace(counts=jnp.asarray(counts), done=jnp.asarray(done))
        step = int(state.step)
        if step >= limit or done.all():
            return state
        state = _go_on(*choosing, state, min(step + STEPS_BETWEEN_STOPS, limit))


def _completions(state: _State) -> list[list[int]]:
    counts, tokens = np.asarray(state.counts), np.asarray(state.tokens)
    return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]
