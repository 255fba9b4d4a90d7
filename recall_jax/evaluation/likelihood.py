"""Compute the log-likelihoods of given tokens: of continuations, or of texts for perplexity."""

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
"""The number of tokens whose logits, over the vocabulary, are in memory at a time."""


def log_likelihoods(
    arch: Architecture,
    params: Params,
    contexts: Sequence[Tokens],
    continuations: Sequence[Tokens],
    *,
    batch_size: int,
    dtype: DTypeLike = jnp.float32,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score n continuations after their contexts: return (sum, is_greedy, num_tokens), (n,) each.

    sum (float64, nats) is the sum of ln p(token | all tokens before it) over the continuation, each
    computed in float32; is_greedy (bool) is whether each of its tokens is the likeliest; num_tokens
    (int64) is its length. The forward runs in `dtype`.

    Raises:
        InputError: for a context without tokens, or a token outside the vocabulary.
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
        row_of, positions, targets = _targets(batch.input_ids.shape[1], members, rows, num_tokens)
        scores, likeliest = _scores(
            arch, dtype, params, *batch, _padded(positions), _padded(targets)
        )
        np.add.at(sums, row_of, np.asarray(scores, np.float64)[: len(row_of)])
        np.logical_and.at(is_greedy, row_of, np.asarray(likeliest)[: len(row_of)])
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
    """Score n texts: return (negative log-likelihood in nats, float64, counted tokens), (n,) each.

    A text of more than `max_length` tokens is split by `rolling_windows`. Without `prefix_token_id`
    the first token of a text is not counted, as it has no context.
    """
    prefix = [] if prefix_token_id is None else [prefix_token_id]
    windows = [rolling_windows([*prefix, *row], max_length) for row in rows]
    pairs = [pair for windows_of_row in windows for pair in windows_of_row]
    contexts, continuations = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    sums, _, num_tokens = log_likelihoods(
        arch, params, contexts, continuations, batch_size=batch_size, dtype=dtype
    )
    row_of = np.repeat(np.arange(len(rows)), [len(windows_of_row) for windows_of_row in windows])
    nll, count = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
    np.add.at(nll, row_of, -sums)
    np.add.at(count, row_of, num_tokens)
    return nll, count


def rolling_windows(tokens: Tokens, max_length: int) -> list[tuple[Tokens, Tokens]]:
    """Return (context, continuation) pairs in which each token but the first is predicted once.

    A window feeds at most `max_length` tokens. Its context is one token, except that of the last
    window, which is as long as fits: the windows of lm-evaluation-harness.
    """
    windows = []
    for start in range(1, len(tokens), max_length):
        end = min(start + max_length, len(tokens))
        first = max(end - 1 - max_length, 0)
        windows.append((tokens[first:start], tokens[start:end]))
    return windows


def _targets(
    width: int, members: np.ndarray, rows: Sequence[Tokens], num_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the row, the position in the flattened batch, and the id of each token to score.

    The position is that of the token before it, whose logits predict it.
    """
    row_of: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for slot, row in enumerate(members):
        if row >= 0:
            last, count = len(rows[row]), num_tokens[row]
            row_of += [row] * count
            positions += range(slot * width + last - 1 - count, slot * width + last - 1)
            targets += rows[row][last - count :]
    return (
        np.asarray(row_of, np.int64),
        np.asarray(positions, np.int32),
        np.asarray(targets, np.int32),
    )


def _padded(values: np.ndarray) -> np.ndarray:
    """Append zeros up to a power of two, so that few programs are compiled."""
    length = max(16, 1 << (len(values) - 1).bit_length())
    return np.pad(values, (0, length - len(values)))


@partial(jax.jit, static_argnames=("arch", "dtype"))
def _scores(
    arch: Architecture,
    dtype: DTypeLike,
    params: Params,
    input_ids: Array,
    attention_mask: Array,
    positions: Array,
    targets: Array,
) -> tuple[Array, Array]:
    """Return ln p of each target (N,) at its flat position (N,), and whether it is likeliest."""
    _, normed = forward(arch, params, input_ids, attention_mask, observe=lambda _: (), dtype=dtype)
    states = normed.reshape(-1, arch.hidden_size)[positions]

    def score(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        normed, targets = chunk
        scores = logits(arch, params, normed[None])[0]
        score_of_target = jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]
        log_p = score_of_target - jax.nn.logsumexp(scores, axis=1)
        return log_p, jnp.argmax(scores, axis=1) == targets

    size = min(TOKENS_AT_ONCE, len(targets))
    chunks = (states.reshape(-1, size, arch.hidden_size), targets.reshape(-1, size))
    log_p, likeliest = jax.lax.map(score, chunks)
    return log_p.reshape(-1), likeliest.reshape(-1)
