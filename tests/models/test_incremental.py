"""Reading through a cache is reading everything at once, whatever the padding."""

import jax
import numpy as np
import pytest

from recall_jax.models.config import read_architecture
from recall_jax.models.forward import forward, init_params
from recall_jax.models.incremental import extend, prefill

ARCH = read_architecture(
    {
        "model_type": "qwen3",
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
)
LENGTHS, PROMPT = np.array([9, 5, 2]), 9
ROWS = np.random.default_rng(0).integers(0, 23, (3, 14)).astype(np.int32)


@pytest.fixture(scope="module")
def tree():
    tree = init_params(ARCH, jax.random.key(3, impl="rbg"))
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 2 else leaf, tree)


@pytest.fixture(scope="module")
def whole(tree):
    """Final-norm output (3, 14, E) of the rows, which right padding would not change."""
    return np.asarray(forward(ARCH, tree, ROWS, np.ones_like(ROWS))[1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_then_tokens_are_as_all_at_once(side, tree, whole):
    mask = (np.arange(PROMPT)[None] < LENGTHS[:, None]).astype(np.int32)
    ids = np.where(mask, ROWS[:, :PROMPT], 7)
    if side == "left":
        mask = mask[:, ::-1]
        ids = np.stack([np.roll(row, PROMPT - n) for row, n in zip(ids, LENGTHS, strict=True)])
    rows = np.arange(3)
    last, cache = jax.jit(lambda: prefill(ARCH, tree, ids, mask, PROMPT + 5))()
    np.testing.assert_allclose(last, whole[rows, LENGTHS - 1], atol=2e-5)
    read = jax.jit(lambda ids, cache: extend(ARCH, tree, ids, cache))
    done = LENGTHS
    for step in (1, 1, 3):
        places = done[:, None] + np.arange(step)[None]
        normed, cache = read(ROWS[rows[:, None], places], cache)
        np.testing.assert_allclose(normed, whole[rows[:, None], places], atol=2e-5)
        done = done + step
    assert int(cache.length) == PROMPT + 5


def test_the_cache_is_in_the_compute_dtype_and_sized_by_key_value_heads(tree):
    ids = ROWS[:, :4]
    _, cache = jax.eval_shape(
        lambda: prefill(ARCH, tree, ids, np.ones_like(ids), 6, jax.numpy.bfloat16)
    )
    assert cache.keys.shape == cache.values.shape == (3, 3, 6, 2, 8)
    assert cache.keys.dtype == cache.values.dtype == jax.numpy.bfloat16
