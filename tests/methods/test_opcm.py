"""OPCM against the authors' algorithm in float64, which scales at every step."""

import float64_merges as float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recall_jax.methods.opcm import opcm, project_out, sequential_sum

SHAPES = {"wide": (5, 8), "tall": (8, 5), "vector": (6,)}

summed = jax.jit(sequential_sum)
merged_of = jax.jit(opcm, static_argnames="dtype")
projected = jax.jit(project_out)


def values_of(name, alpha):
    return {"alpha": np.float32(alpha)} if len(SHAPES[name]) == 2 else {}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_the_authors_algorithm(alpha, seed):
    rng = np.random.default_rng(seed)
    bases = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    models = [
        {n: b + 0.1 * rng.standard_normal(b.shape).astype(np.float32) for n, b in bases.items()}
        for _ in range(4)
    ]
    wide = [{n: x.astype(np.float64) for n, x in model.items()} for model in (bases, *models)]
    expected, expected_scale = float64.opcm(wide[1:], wide[0], alpha)
    squares = 0
    for name, base in bases.items():
        squares += summed([m[name] for m in models], values_of(name, alpha), base)[1]
    *norms, size = np.sqrt(squares)
    scale = size / np.mean(norms)
    assert scale == pytest.approx(expected_scale, rel=1e-5)
    for name, base in bases.items():
        values = {**values_of(name, alpha), "lambda_": scale}
        merged = merged_of([m[name] for m in models], values, base=base, dtype=np.float32)
        np.testing.assert_allclose(merged, expected[name], rtol=0, atol=3e-6)


def test_changes_of_low_rank_lose_only_what_they_share():
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.standard_normal((8, 3)))
    right, _ = np.linalg.qr(rng.standard_normal((5, 3)))
    ground = np.float32(left[:, :2] * [3, 1] @ right[:, :2].T)
    vector = rng.standard_normal((8, 5))
    inside = left[:, :2].T @ vector @ right[:, :2]
    for alpha, taken in ((0.5, np.diag(np.diag(inside))), (1.0, inside)):
        expected = vector - left[:, :2] @ taken @ right[:, :2].T
        found = projected(np.float32(vector), ground, np.float32(alpha))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    for alpha in (0.0, 1.0):  # nothing there to keep off
        found = projected(np.float32(vector), jnp.zeros_like(ground), np.float32(alpha))
        np.testing.assert_array_equal(found, np.float32(vector))


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_models_that_are_their_base_pass_bit_for_bit(alpha):
    base = np.float32([[-0.0, 1e-40, 3.0], [0.1, -1e-40, 0.0]])
    values = {"lambda_": np.float32(1.0)} | ({"alpha": np.float32(alpha)} if alpha else {})
    merged = np.asarray(merged_of([base] * 3, values, base=base, dtype=np.float32))
    np.testing.assert_array_equal(merged.view(np.uint32), base.view(np.uint32))
