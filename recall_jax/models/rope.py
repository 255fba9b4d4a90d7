"""Compute rotary position embeddings (Su et al. 2021, arXiv 2104.09864) and their scaled kinds.

The static kinds are constants of the architecture, computed in numpy while tracing, in float32 and
in transformers' order of operations, with which the weights were trained.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from recall_jax.models.architecture import Architecture, Rope

Array = jax.Array


def cos_sin(arch: Architecture, positions: Array, lengths: Array) -> tuple[Array, Array]:
    """Return the cosines and sines to rotate by, float32 (B, T, D / 2), at int32 positions (B, T).

    `lengths` (B,) are the numbers of real tokens, which dynamic scaling depends on. Both results
    include the kind's attention factor.
    """
    frequencies = inverse_frequencies(arch.rope, arch.head_dim, lengths)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[:, None, :]
    factor = arch.rope.attention_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def inverse_frequencies(rope: Rope, head_dim: int, lengths: Array) -> Array:
    """Return theta^(-2i/D), scaled by kind, float32 (B, D / 2), or (1, D / 2) if equal in all rows.

    Linear: Chen et al. 2023, arXiv 2306.15595. Dynamic: NTK-aware scaling of theta by the row's
    length beyond the trained one. Llama3: long wavelengths divided by the factor, short ones kept,
    those between interpolated. Yarn: Peng et al. 2023, arXiv 2309.00071.
    """
    if rope.kind == "dynamic":
        trained = rope.original_max_position_embeddings
        assert trained is not None
        stretch = jnp.maximum(lengths, trained).astype(jnp.float32) / trained
        growth = (rope.factor * stretch - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
        exponents = _exponents(head_dim)[None, :]
        return 1 / (rope.theta * growth[:, None]) ** exponents
    unscaled = 1 / np.float32(rope.theta) ** _exponents(head_dim)
    match rope.kind:
        case "default":
            scaled = unscaled
        case "linear":
            scaled = unscaled / np.float32(rope.factor)
        case "llama3":
            scaled = _llama3(rope, unscaled)
        case "yarn":
            scaled = _yarn(rope, unscaled)
        case _:
            raise ValueError(f"unknown rope kind {rope.kind!r}")
    return jnp.asarray(scaled, jnp.float32)[None, :]


def apply_rope(states: Array, cos: Array, sin: Array) -> Array:
    """Rotate the halves of the last axis: (B, T, …, D) by (B, T, D / 2), in float32."""
    middle = (1,) * (states.ndim - 3)
    cos, sin = (x.reshape(*x.shape[:2], *middle, x.shape[2]) for x in (cos, sin))
    first, second = jnp.split(states.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(states.dtype)


def _exponents(head_dim: int) -> np.ndarray:
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)


def _llama3(rope: Rope, unscaled: np.ndarray) -> np.ndarray:
    trained = rope.original_max_position_embeddings
    assert trained is not None
    turns = trained * unscaled / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * unscaled / rope.factor + kept * unscaled


def _yarn(rope: Rope, unscaled: np.ndarray) -> np.ndarray:
    trained = rope.original_max_position_embeddings
    assert trained is not None
    half = len(unscaled)

    def index_of(turns: float) -> float:
        """Return the fractional index of the frequency with so many turns in the trained length."""
        return half * math.log(trained / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = (np.arange(half, dtype=np.float32) - low) / (high - low or 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    return unscaled / rope.factor * (1 - kept) + unscaled * kept
