"""The unit functions and the resident forward: one computation, whatever calls it."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recall_jax.models import decoder
from recall_jax.models.config import read_architecture
from recall_jax.models.forward import (
    attention_windows,
    block,
    context,
    embed,
    forward,
    head,
    init_params,
    logits,
)

TINY = {
    "model_type": "qwen2",
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_sliding_window": True,
    "sliding_window": 3,
    "max_window_layers": 2,
}
ARCH = read_architecture(TINY)
IDS = np.random.default_rng(0).integers(0, 23, (3, 9)).astype(np.int32)
MASK = np.array([[1] * 9, [1] * 5 + [0] * 4, [0] * 7 + [1] * 2], np.int32)


def scaled_params(dtype=jnp.float32):
    """Parameters large enough that every layer matters."""
    tree = init_params(ARCH, jax.random.key(3, impl="rbg"))
    return jax.tree.map(lambda leaf: (leaf * 10 if leaf.ndim > 2 else leaf).astype(dtype), tree)


def pool(hidden):
    weight = (MASK / MASK.sum(1, keepdims=True))[:, :, None].astype(np.float32)
    return (hidden.astype(jnp.float32) * weight).sum(axis=1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_units_called_alone_are_the_resident_forward(dtype):
    tree = scaled_params(jnp.bfloat16)
    states, normed = jax.jit(lambda: forward(ARCH, tree, IDS, MASK, dtype=dtype))()
    alone = jax.jit(lambda *inputs: block(ARCH, *inputs))
    batch = context(ARCH, MASK)
    hidden = embed(ARCH, tree["embed"], IDS, dtype)
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    for i, window in enumerate(attention_windows(ARCH)):
        chex.assert_trees_all_close(states[i], hidden, rtol=tolerance, atol=tolerance)
        params = jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"])
        hidden = alone(params, hidden, batch, window)
        assert hidden.dtype == states[i + 1].dtype == dtype
    chex.assert_trees_all_close(states[-2], hidden, rtol=tolerance, atol=tolerance)
    last = head(ARCH, {"norm": tree["head"]["norm"]}, hidden)
    chex.assert_trees_all_close(states[-1], last, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(states[-1], normed)
    # Full attention and sliding windows are one compiled block.
    assert alone._cache_size() == 1


def test_bfloat16_compute_is_close_to_float32():
    tree = scaled_params()
    exact, normed = forward(ARCH, tree, IDS, MASK, observe=pool)
    rounded, normed16 = forward(ARCH, tree, IDS, MASK, observe=pool, dtype=jnp.bfloat16)
    assert normed.dtype == jnp.float32 and normed16.dtype == jnp.bfloat16
    for a, b in zip(exact, rounded, strict=True):
        assert 0 < np.linalg.norm(a - b) < 0.05 * np.linalg.norm(a)
    scores = logits(ARCH, tree, normed16)
    assert scores.dtype == jnp.float32 and scores.shape == (3, 9, 23)


def test_padding_changes_no_token_and_is_never_nan():
    tree = scaled_params()
    run = jax.jit(lambda ids, mask: forward(ARCH, tree, ids, mask))
    states, _ = run(IDS, MASK)
    other, _ = run(np.where(MASK, IDS, 7), MASK)
    token = MASK.astype(bool)
    for a, b in zip(states, other, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[token], np.asarray(b)[token])
    states, _ = run(IDS, np.zeros_like(MASK))
    chex.assert_tree_all_finite(states)


def test_a_window_forgets_and_causality_holds():
    tree = scaled_params()
    params = jax.tree.map(lambda leaf: leaf[0], tree["layers"])
    batch = context(ARCH, np.ones_like(MASK))
    hidden = embed(ARCH, tree["embed"], IDS)
    changed = hidden.at[:, 4].add(1.0)
    difference = block(ARCH, params, changed, batch, 3) - block(ARCH, params, hidden, batch, 3)
    touched = np.abs(np.asarray(difference)).max(axis=(0, 2)) > 0
    assert touched.tolist() == [False] * 4 + [True] * 3 + [False] * 2


def test_a_mask_of_another_shape_is_not_broadcast():
    with pytest.raises(AssertionError):
        forward(ARCH, scaled_params(), IDS, MASK[:1])


def test_float32_products_ask_for_the_highest_precision():
    tree = scaled_params()
    run = jax.jit(lambda: logits(ARCH, tree, forward(ARCH, tree, IDS, MASK)[1]))
    products = [line for line in run.lower().as_text().splitlines() if "dot_general" in line]
    assert len(products) >= 9 and all("HIGHEST" in line for line in products)


@pytest.mark.optimised
def test_pooling_inside_the_scan_never_holds_all_hidden_states():
    deep = read_architecture(TINY | {"num_hidden_layers": 24, "hidden_size": 64, "vocab_size": 5})
    ids = jnp.zeros((4, 64), jnp.int32)
    one_state = 4 * 64 * 64 * 4

    tree = jax.eval_shape(lambda: init_params(deep, jax.random.key(0, impl="rbg")))

    def temporaries(observe):
        run = jax.jit(lambda tree: forward(deep, tree, ids, ids + 1, observe=observe)[0])
        memory = run.lower(tree).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    everything = temporaries(lambda hidden: hidden)
    pooled = temporaries(lambda hidden: hidden.mean(axis=1))
    assert everything - pooled > 20 * one_state


def test_queries_in_blocks_are_the_same_attention(monkeypatch):
    tree = scaled_params()
    random = np.random.default_rng(0)
    input_ids = random.integers(0, 23, (3, 24)).astype(np.int32)
    attention_mask = np.ones_like(input_ids)
    attention_mask[0, 17:] = 0
    attention_mask[1, :9] = 0
    _, whole = forward(ARCH, tree, input_ids, attention_mask)
    monkeypatch.setattr(decoder, "QUERY_BLOCK", 8)
    _, in_blocks = forward(ARCH, tree, input_ids, attention_mask)
    np.testing.assert_allclose(in_blocks, whole, atol=1e-5)
    program = jax.jit(partial(forward, ARCH)).lower(tree, input_ids, attention_mask).as_text()
    assert "3x2x2x8x24xf32" in program  # the scores of a block of queries
    assert "3x2x2x24x24xf32" not in program
