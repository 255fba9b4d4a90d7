"""How likely a model finds given tokens: of continuations, and of whole texts (perplexity)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from recall_jax.generation.generate import check_token_ids
from recall_jax.inputs.batches import make_batches
from recall_jax.models.architecture import Architecture
from recall_jax.models.forward import forward, logits

Array = jax.Array
Params = dict[str, Any]
Tokens = Sequence[int]

TOKENS_AT_ONCE = 128
"""So many tokens' logits exist at a time, a vocabulary each."""


def log_likelihoods(
    arch: Architecture,
    params: Params,
    contexts: Sequence[Tokens],
    continuations: Sequence[Tokens],
    *,
    batch_size: int,
    dtype: DTypeLike = jnp.float32,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of n continuations, each after its context: (sum, is_greedy, num_tokens), (n,) each.

    sum (float64) is that of ln p(token | all before it) over the tokens of the continuation, nats,
    each in float32; is_greedy (bool) whether every one of them is the likeliest; num_tokens (int64)
    is their number. The forward runs in `dtype`.

    Raises:
        InputError: for a context without tokens, or a token out of the vocabulary.
    """
    check_token_ids(arch, contexts, "context")
    rows = [[*context, *rest] for context, rest in zip(contexts, continuations, strict=True)]
    check_token_ids(arch, rows, "row")
    params = jax.device_put(params)
    num_tokens = np.asarray([len(rest) for rest in continuations], np.int64)
    # The last token of a row is only a target.
    batches = make_batches([row[:-1] for row in rows], batch_size)
    rows_at = np.full(len(batches.batches) * batch_size, -1)
    rows_at[batches.order] = np.arange(len(rows))
    sums, is_greedy = np.zeros(len(rows)), np.ones(len(rows), bool)
    for batch, members in zip(batches.batches, rows_at.reshape(-1, batch_size), strict=True):
        owner, places, targets = _wanted(batch.input_ids.shape[1], members, rows, num_tokens)
        scores, likeliest = _scores(arch, dtype, params, *batch, _filled(places), _filled(targets))
        np.add.at(sums, owner, np.asarray(scores, np.float64)[: len(owner)])
        np.logical_and.at(is_greedy, owner, np.asarray(likeliest)[: len(owner)])
    return sums, is_greedy, num_tokens


def token_nll(
    arch: Architecture,
    params: Params,
    rows: Sequence[Tokens],
    *,
    max_length: int,
    prefix_token_id: int | None,
    batch_size: int,
    dtype: DTypeLike = jnp.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """Of n whole texts: (negative log-likelihood float64, tokens that it counts), (n,) each; nats.

    A text of more than `max_length` tokens is cut as by `rolling_windows`. Without
    `prefix_token_id` the first token of a text is not counted, as nothing stands before it.
    """
    prefix = [] if prefix_token_id is None else [prefix_token_id]
    windows = [rolling_windows([*prefix, *row], max_length) for row in rows]
    pairs = [pair for of_row in windows for pair in of_row]
    contexts, continuations = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    sums, _, num_tokens = log_likelihoods(
        arch, params, contexts, continuations, batch_size=batch_size, dtype=dtype
    )
    owner = np.repeat(np.arange(len(rows)), [len(of_row) for of_row in windows])
    nll, count = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
    np.add.at(nll, owner, -sums)
    np.add.at(count, owner, num_tokens)
    return nll, count


def rolling_windows(tokens: Tokens, max_length: int) -> list[tuple[Tokens, Tokens]]:
    """(context, continuation) pairs in which each token but the first is predicted once.

    A window feeds at most `max_length` tokens. One follows the other with one token of context,
    only the last reaches back as far as fits: the windows of lm-evaluation-harness.
    """
    windows = []
    for start in range(1, len(tokens), max_length):
        end = min(start + max_length, len(tokens))
        first = max(end - 1 - max_length, 0)
        windows.append((tokens[first:start], tokens[start:end]))
    return windows


def _wanted(
    width: int, members: np.ndarray, rows: Sequence[Tokens], num_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the tokens to be scored of a batch: their row, place in the flat batch, and id."""
    owner: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    for slot, row in enumerate(members):
        if row >= 0:
            last, count = len(rows[row]), num_tokens[row]
            owner += [row] * count
            places += range(slot * width + last - 1 - count, slot * width + last - 1)
            targets += rows[row][last - count :]
    return np.asarray(owner, np.int64), np.asarray(places, np.int32), np.asarray(targets, np.int32)


def _filled(values: np.ndarray) -> np.ndarray:
    """With zeros up to a power of two, so that few programs are compiled."""
    length = max(16, 1 << (len(values) - 1).bit_length())
    return np.pad(values, (0, length - len(values)))


@partial(jax.jit, static_argnames=("arch", "dtype"))
def _scores(
    arch: Architecture,
    dtype: DTypeLike,
    params: Params,
    input_ids: Array,
    attention_mask: Array,
    places: Array,
    targets: Array,
) -> tuple[Array, Array]:
    """ln p of each target (N,) after the flat place (N,), and whether it is the likeliest."""
    _, normed = forward(arch, params, input_ids, attention_mask, observe=lambda _: (), dtype=dtype)
    wanted = normed.reshape(-1, arch.hidden_size)[places]

    def score(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        normed, targets = chunk
        scores = logits(arch, params, normed[None])[0]
        mine = jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]
        log_p = mine - jax.nn.logsumexp(scores, axis=1)
        return log_p, jnp.argmax(scores, axis=1) == targets

    at_once = min(TOKENS_AT_ONCE, len(targets))
    chunks = (wanted.reshape(-1, at_once, arch.hidden_size), targets.reshape(-1, at_once))
    log_p, likeliest = jax.lax.map(score, chunks)
    return log_p.reshape(-1), likeliest.reshape(-1)
