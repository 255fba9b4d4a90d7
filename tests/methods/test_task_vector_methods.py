"""Task arithmetic, TIES, DARE and MagMax: mergekit's results, float64, and their algebra."""

import inspect
import json
from functools import partial
from pathlib import Path

import float64_merges as float64
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.methods import dare as dare_module
from recall_jax.methods.dare import dare
from recall_jax.methods.magmax import magmax
from recall_jax.methods.sparsify import keep_largest, tree_sum
from recall_jax.methods.task_arithmetic import task_arithmetic
from recall_jax.methods.ties import ties

REFERENCE = np.load(Path(__file__).with_name("mergekit_reference.npz"))
CASES = json.loads(str(REFERENCE["cases"]))
KERNELS = {
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": partial(dare, consensus=False),
    "dare_ties": partial(dare, consensus=True),
    "magmax": magmax,
}


def jitted(kernel):
    taken = inspect.signature(kernel).parameters
    options = [name for name in ("normalize", "rescale", "consensus") if name in taken]
    return jax.jit(kernel, static_argnames=["dtype", *options])


JITTED = {name: jitted(kernel) for name, kernel in KERNELS.items()}
dare_jitted = jitted(dare)
FLOATS = (np.float32, ml_dtypes.bfloat16, np.float16)
SHAPE = (6, 7)
seeds = st.integers(0, 2**32 - 1)


def values_of(weights, densities=None, lambda_=1.0, seed=0):
    densities = [1.0] * len(weights) if densities is None else densities
    return {
        "weight": np.float32(weights),
        "density": np.float32(densities),
        "lambda_": np.float32(lambda_),
        "seed": np.uint32(seed),
    }


def toys(seed, count=3, dtype=np.float32):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(SHAPE)
    models = base + 0.1 * rng.standard_normal((count, *SHAPE))
    return [model.astype(dtype) for model in models], base.astype(dtype), rng


def bits(array):
    return np.asarray(array).view(f"u{np.asarray(array).dtype.itemsize}")


def close(merged, expected):
    """Float32's rounding of numbers of a few units."""
    np.testing.assert_allclose(np.asarray(merged, np.float64), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", list(CASES))
def test_what_mergekit_gives(case, monkeypatch):
    parameters = CASES[case]
    drawn = iter(jnp.asarray(REFERENCE["masks"]))
    monkeypatch.setattr(dare_module, "keep_at_random", lambda *_: next(drawn))
    options = {key: parameters[key] for key in ("normalize", "rescale") if key in parameters}
    merged = KERNELS[case.split()[0]](
        list(map(jnp.asarray, REFERENCE["models"])),
        values_of(parameters["weight"], parameters["density"], parameters["lambda"]),
        base=jnp.asarray(REFERENCE["base"]),
        dtype=np.float32,
        **options,
    )
    close(merged, REFERENCE[case])


@given(seeds, st.sampled_from(FLOATS), st.booleans())
def test_task_arithmetic_of_any_dtype_in_float64(seed, dtype, normalize):
    models, base, rng = toys(seed, dtype=dtype)
    weights, lambda_ = rng.uniform(0.1, 1, 3), rng.uniform(-1, 1)
    values = values_of(weights, lambda_=lambda_)
    options = {"base": base, "dtype": np.float32, "normalize": normalize}
    merged = JITTED["task_arithmetic"](models, values, **options)
    wide = np.asarray(base, np.float64)
    close(merged, float64.task_arithmetic(models, wide, weights, lambda_, normalize))
    narrow = JITTED["task_arithmetic"](models, values, **(options | {"dtype": dtype}))
    np.testing.assert_array_equal(bits(narrow), bits(np.asarray(merged).astype(dtype)))


@given(seeds, st.sampled_from([(True, False), (False, True)]))
def test_ties_in_float64(seed, switches):
    normalize, rescale = switches
    models, base, rng = toys(seed, dtype=ml_dtypes.bfloat16)
    weights = rng.uniform(-0.5, 1, 3)
    densities = rng.choice([0.01, 0.3, 0.5, 0.7, 1.0] if rescale else [0.0, 0.3, 0.5, 1.0], 3)
    options = {"normalize": normalize, "rescale": rescale}
    merged = JITTED["ties"](
        models, values_of(weights, densities, 0.8), base=base, dtype=np.float32, **options
    )
    wide = np.asarray(base, np.float64)
    expected = float64.ties(models, wide, np.float32(weights), densities, 0.8, **options)
    scale = 1 / max(min(abs(weights)), 0.05)  # a quotient of weights that almost cancel
    np.testing.assert_allclose(merged, expected, rtol=0, atol=4e-6 * scale)


@given(
    seeds,
    st.sampled_from([(False, False, True), (True, True, "density"), (True, False, False)]),
)
def test_dare_in_float64(seed, switches):
    consensus, normalize, rescale = switches
    models, base, rng = toys(seed)
    weights, densities = rng.uniform(0.1, 1, 3), rng.choice([0.2, 0.6, 1.0], 3)
    values = values_of(weights, densities, 0.7, seed)
    options = {"normalize": normalize, "rescale": rescale, "consensus": consensus}
    merged = dare_jitted(models, values, base=base, dtype=np.float32, **options)
    # What was kept shows where one model alone is merged, in its own place.
    masks, scales = [], []
    for index, density in enumerate(densities):
        alone = [model if k == index else base for k, model in enumerate(models)]
        plain = {"base": base, "dtype": np.float32, "consensus": False, "rescale": False}
        kept = dare_jitted(alone, values, **plain)
        masks.append(np.asarray(kept) != base)
        vector = np.abs(models[index].astype(np.float64) - base)
        ratio = vector.sum() / max((masks[-1] * vector).sum(), 1e-9)
        scales.append({True: ratio, False: 1, "density": 1 / density}[rescale])
    options = {"normalize": normalize, "consensus": consensus, "scales": scales}
    expected = float64.dare(models, base.astype(np.float64), weights, masks, 0.7, **options)
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-5)


def test_dare_keeps_each_element_with_its_chance_and_draws_anew_for_each_model_and_seed():
    base = np.zeros(40_000, np.float32)
    models = [np.ones(40_000, np.float32)] * 2
    kept = {}
    for seed in (0, 1):
        for index in range(2):
            values = values_of(np.eye(2)[index], [0.3, 0.8], seed=seed)
            options = {"base": base, "dtype": np.float32, "consensus": False, "rescale": False}
            kept[seed, index] = np.asarray(dare_jitted(models, values, **options)) == 1
            again = dare_jitted(models, values, **options)
            np.testing.assert_array_equal(kept[seed, index], again)
    for (_, index), mask in kept.items():
        assert abs(mask.mean() - (0.3, 0.8)[index]) < 4 * np.sqrt(0.25 / 40_000)
    both = (kept[0, 0] & kept[0, 1]).mean(), (kept[0, 0] & kept[1, 0]).mean()
    np.testing.assert_allclose(both, [0.3 * 0.8, 0.3 * 0.3], atol=0.01)
    values = values_of([1, 0], [0.3, 1])
    merged = dare_jitted(
        models, values, base=base, dtype=np.float32, consensus=False, rescale="density"
    )
    np.testing.assert_allclose(np.unique(merged), [0, 1 / 0.3], rtol=1e-6)


@given(seeds, st.sampled_from(FLOATS[:2]))
def test_magmax_in_float64(seed, dtype):
    models, base, _ = toys(seed, dtype=dtype)
    merged = JITTED["magmax"](models, values_of([1] * 3, lambda_=0.5), base=base, dtype=np.float32)
    close(merged, float64.magmax(models, base.astype(np.float64), 0.5))


@pytest.mark.parametrize(
    ("method", "dtype"),
    [*((name, np.float32) for name in KERNELS), *(("magmax", kind) for kind in FLOATS[1:])],
)
def test_models_that_are_their_base_pass_bit_for_bit(method, dtype):
    rng = np.random.default_rng(0)
    width = np.dtype(dtype).itemsize * 8
    patterns = rng.integers(0, 2**width, 4000, dtype=np.uint64).astype(f"u{width // 8}")
    patterns = np.concatenate([patterns, np.arange(16, dtype=patterns.dtype)])  # and subnormals
    patterns = np.concatenate([patterns, patterns | (1 << (width - 1))]).astype(patterns.dtype)
    base = patterns.view(dtype)
    base = base[np.isfinite(base.astype(np.float32))]
    values = values_of([0.3, 0.7, -0.2], [0.4, 0.8, 0.2], 0.9)
    merged = JITTED[method]([base] * 3, values, base=base, dtype=dtype)
    assert merged.dtype == dtype
    np.testing.assert_array_equal(bits(merged), bits(base))


@given(seeds, st.permutations(range(3)), st.sampled_from(["task_arithmetic", "ties", "magmax"]))
def test_the_order_of_the_models_does_not_matter(seed, order, method):
    """On a grid as coarse as that of bfloat16 fine-tunes, where changes are equal or cancel."""
    rng = np.random.default_rng(seed)
    base = np.ones(SHAPE, np.float32)
    models = base + rng.integers(-3, 4, (3, *SHAPE)).astype(np.float32) / 256
    weights = rng.choice([0.1, 0.3, 0.7], 3)
    densities = rng.choice([0.3, 0.6, 1.0], 3)
    merged = JITTED[method](
        list(models), values_of(weights, densities), base=base, dtype=np.float32
    )
    moved = values_of(weights[list(order)], densities[list(order)])
    again = JITTED[method]([models[k] for k in order], moved, base=base, dtype=np.float32)
    close(merged, np.asarray(again, np.float64))


@given(seeds, st.integers(1, 300), st.just(0.0) | st.floats(0.001, 1))
def test_the_largest_are_found_without_sorting(seed, size, density):
    rng = np.random.default_rng(seed)
    vector = (rng.standard_normal(size) * 10.0 ** rng.integers(-44, 30, size)).astype(np.float32)
    vector[rng.random(size) < 0.2] = 0
    padded = np.resize(vector, 300)
    padded[size:] = 0
    kept = np.asarray(jax.jit(keep_largest)(padded, np.float32(density)))
    expected = float64.largest(padded.astype(np.float64), float(np.float32(density)) * (1 + 1e-7))
    np.testing.assert_array_equal(np.where(kept, padded, 0), expected)


def test_density_counts_as_the_decimal_number_it_was():
    for tenths in range(1, 10):
        kept = keep_largest(jnp.arange(1.0, 11.0), jnp.float32(tenths / 10))
        assert int(kept.sum()) == tenths


def test_long_sums_lose_nothing():
    assert float(tree_sum(jnp.full(1_000_003, 0.1))) == pytest.approx(100_000.3, rel=1e-6)
