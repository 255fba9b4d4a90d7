"""What every measure of the registry promises: algebra, ranges, gradients, and no silent NaN."""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recall_jax.errors import InputError
from recall_jax.similarity import MEASURES

SHAPE = N, E = 24, 5
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=6)
every_measure = pytest.mark.parametrize("name", MEASURES)

RIGID = frozenset({"rotation", "translation"})
SHAPES = RIGID | {"scaling"}
AFFINE = SHAPES | {"linear"}
ANGLES = frozenset({"rotation", "scaling"})


@dataclass(frozen=True)
class Promise:
    """What moves of X, and of Y if those are others, leave the value of a measure as it is.

    `falls`: it tells more and more noise. `smooth`: its gradient is finite for any X and Y.
    """

    x: frozenset[str]
    y: frozenset[str] | None = None
    falls: bool = True
    smooth: bool = True

    def moves(self, side):
        return self.x if side == "x" or self.y is None else self.y


PROMISES = {
    "paired_rbf": Promise(frozenset()),
    "row_cosine": Promise(frozenset({"scaling"})),
    "linear_cka": Promise(SHAPES),
    "rbf_cka": Promise(SHAPES),
    "debiased_linear_cka": Promise(SHAPES),
    "debiased_rbf_cka": Promise(SHAPES),
    "hsic": Promise(RIGID, falls=False),  # noise that adds variance adds covariance by chance
    "distance_correlation": Promise(SHAPES),
    "rsa": Promise(frozenset({"scaling"})),
    "mutual_knn": Promise(ANGLES),
    "jaccard_knn": Promise(ANGLES),
    "second_order_cosine": Promise(ANGLES),
    "imd": Promise(SHAPES, falls=False),  # a cloud with noise is a cloud
    "procrustes_distance": Promise(SHAPES),
    "angular_procrustes": Promise(SHAPES),
    "size_and_shape_distance": Promise(RIGID),
    "aligned_cosine": Promise(ANGLES, smooth=False),
    "mean_cca": Promise(AFFINE, smooth=False),
    "svcca": Promise(SHAPES, smooth=False),
    "pwcca": Promise(frozenset({"scaling", "translation"}), AFFINE, smooth=False),
    "linear_regression": Promise(SHAPES, AFFINE, smooth=False),
    "eigenspace_overlap": Promise(AFFINE - {"translation"}, smooth=False),
    "gulp": Promise(SHAPES, smooth=False),
}


def rotation(rng):
    return np.linalg.qr(rng.standard_normal((E, E)))[0]


MOVES = {
    "rotation": lambda X, rng: X @ rotation(rng),
    "scaling": lambda X, rng: X * rng.choice([0.01, 0.5, 30.0]),
    "translation": lambda X, rng: X + rng.standard_normal(E),
    "linear": lambda X, rng: X @ rotation(rng) * rng.uniform(0.3, 3, E) @ rotation(rng),
}


def test_every_measure_has_its_promise():
    assert set(PROMISES) == set(MEASURES)


@cache
def options(name):
    """What has no default."""
    measure = MEASURES[name]
    return {option: 1.5 for option in measure.options if option not in measure.defaults}


def evaluate(name, X, Y):
    """The value in the precision of X."""
    with jax.enable_x64(X.dtype == np.float64):
        value = MEASURES[name].function(X, Y, **options(name))
    assert value.shape == () and value.dtype == X.dtype
    return float(value)


def related(seed):
    """X and Y (24, 5), float64, Y near X, with the generator to go on with."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal(SHAPE)
    return X, X + rng.choice([0.3, 1.0]) * rng.standard_normal(SHAPE), rng


def assert_in_bounds(name, value, rounding):
    low, high = MEASURES[name].bounds
    assert np.isfinite(value)
    assert low - rounding <= value <= high + rounding


@every_measure
@given(seed=seeds)
@few
def test_values_are_in_range_symmetric_and_known_for_equal_sides(name, seed):
    X, Y, rng = related(seed)
    measure = MEASURES[name]
    value = evaluate(name, X, Y)
    assert_in_bounds(name, value, 1e-12)
    assert_in_bounds(name, evaluate(name, X, 3 * rng.standard_normal(SHAPE)), 1e-12)
    if measure.symmetric:
        assert evaluate(name, Y, X) == pytest.approx(value, abs=1e-10)
    equal = evaluate(name, X, X)
    if measure.distance:
        assert equal == pytest.approx(measure.bounds[0], abs=1e-6)
        assert value > equal + 1e-7
    elif np.isfinite(measure.bounds[1]):
        assert equal == pytest.approx(measure.bounds[1], abs=1e-10)
        assert value < equal - 1e-7


@every_measure
@given(seed=seeds)
@few
def test_declared_moves_change_nothing(name, seed):
    X, Y, rng = related(seed)
    value = evaluate(name, X, Y)
    for move in sorted(PROMISES[name].moves("x")):
        assert evaluate(name, MOVES[move](X, rng), Y) == pytest.approx(value, rel=1e-8, abs=1e-8)
    for move in sorted(PROMISES[name].moves("y")):
        assert evaluate(name, X, MOVES[move](Y, rng)) == pytest.approx(value, rel=1e-8, abs=1e-8)


@every_measure
def test_other_moves_change_something(name):
    X, Y, rng = related(1)
    value = evaluate(name, X, Y)
    for move in sorted(set(MOVES) - PROMISES[name].moves("x")):
        moved = [evaluate(name, MOVES[move](X, rng), Y) for _ in range(6)]
        assert max(abs(other - value) for other in moved) > 1e-3 * abs(value), move
    for move in sorted(set(MOVES) - PROMISES[name].moves("y")):
        moved = [evaluate(name, X, MOVES[move](Y, rng)) for _ in range(6)]
        assert max(abs(other - value) for other in moved) > 1e-3 * abs(value), move


@pytest.mark.parametrize("name", [name for name in PROMISES if PROMISES[name].falls])
def test_more_noise_is_less_similar(name):
    rng = np.random.default_rng(0)
    X, noise = rng.standard_normal((2, 12, *SHAPE))
    means = [
        np.mean([evaluate(name, x, x + level * e) for x, e in zip(X, noise, strict=True)])
        for level in (0.0, 0.2, 0.6, 2.0)
    ]
    steps = np.diff(means)
    assert (steps > 0).all() if MEASURES[name].distance else (steps < 0).all(), means


@every_measure
@given(seed=seeds)
@few
def test_single_precision_agrees_with_double(name, seed):
    X, Y, _ = related(seed)
    double = evaluate(name, X, Y)
    single = evaluate(name, X.astype(np.float32), Y.astype(np.float32))
    assert single == pytest.approx(double, abs=1e-5, rel=1e-5)
    assert_in_bounds(name, single, 1e-5)


@every_measure
def test_parts_give_the_functions_values_for_many_pairs_at_once(name):
    measure = MEASURES[name]
    rng = np.random.default_rng(0)
    X = rng.standard_normal((3, *SHAPE)).astype(np.float32)
    Y = X + rng.standard_normal((3, *SHAPE)).astype(np.float32)
    expected = [evaluate(name, x, y) for x, y in zip(X, Y, strict=True)]
    for parts in filter(None, (measure.parts, measure.narrow)):
        many = jax.jit(jax.vmap(partial(parts.evaluate, **measure.defaults | options(name))))
        np.testing.assert_allclose(many(X, Y), expected, rtol=1e-5, atol=2e-6)


@cache
def gradient(name):
    return jax.jit(jax.grad(partial(MEASURES[name].function, **options(name)), argnums=(0, 1)))


@every_measure
def test_gradients_are_the_slopes(name):
    X, Y, rng = related(2)
    along = rng.standard_normal((2, *SHAPE))
    step = 1e-6
    ahead = evaluate(name, X + step * along[0], Y + step * along[1])
    behind = evaluate(name, X - step * along[0], Y - step * along[1])
    with jax.enable_x64(True):
        slopes = gradient(name)(X, Y)
    slope = sum(np.vdot(d, v) for d, v in zip(slopes, along, strict=True))
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-5, abs=1e-7)


def with_constant_column(X):
    X = X.copy()
    X[:, 1] = 0.1
    return X


def with_duplicates(X):
    return np.concatenate([X[: N // 2], X[: N // 2]])


def with_one_sample_apart(X):
    rest = np.zeros_like(X)
    rest[3] = X[3]
    return rest


def with_one_row_of_zeros(X):
    X = X.copy()
    X[7] = 0
    return X


DEGENERATE = {
    "constant column": with_constant_column,
    "duplicate rows": with_duplicates,
    "all rows equal": lambda X: np.broadcast_to(X[:1], X.shape).copy(),
    "all zero": np.zeros_like,
    "one sample apart": with_one_sample_apart,
    "one row of zeros": with_one_row_of_zeros,
    "one direction": lambda X: X[:, :1] @ X[:1],
    "no variance within rows": lambda X: np.repeat(X[:, :1], E, axis=1),
    "far off": lambda X: X + np.float32(1e4),
    "tiny": lambda X: X * np.float32(1e-30),
}


@every_measure
@pytest.mark.parametrize("make", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_sides_have_a_finite_value_in_range(name, make):
    X, Y, _ = related(3)
    X, Y = make(X.astype(np.float32)), Y.astype(np.float32)
    for sides in [(X, Y), (Y, X), (X, X)]:
        assert_in_bounds(name, evaluate(name, *sides), 1e-5)


@pytest.mark.parametrize("name", [name for name in PROMISES if PROMISES[name].smooth])
def test_gradients_are_finite_for_degenerate_sides(name):
    X, Y, _ = related(3)
    with jax.enable_x64(True):
        for kind, make in DEGENERATE.items():
            for sides in [(make(X), Y), (Y, make(X)), (make(X), make(X)), (X, X)]:
                slopes = gradient(name)(*sides)
                assert all(jnp.isfinite(slope).all() for slope in slopes), kind


@pytest.mark.parametrize("name", [name for name in PROMISES if "scaling" in PROMISES[name].x])
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_scale_costs_no_digits_in_single_precision(name, scale):
    X, Y, _ = (Z.astype(np.float32) if isinstance(Z, np.ndarray) else Z for Z in related(4))
    expected = evaluate(name, X, Y)
    assert evaluate(name, X * np.float32(scale), Y) == pytest.approx(expected, abs=1e-5)


@every_measure
@pytest.mark.parametrize("shape", [(1, 5), (2, 5), (16, 20)], ids=str)
def test_few_samples_have_a_value_in_range_or_one_clear_error(name, shape):
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((2, *shape)).astype(np.float32)
    try:
        value = evaluate(name, X, Y)
    except InputError as error:
        assert shape[0] < 16 and "samples" in str(error) and "\n" not in str(error)
    else:
        assert_in_bounds(name, value, 1e-5)


def with_entry(value):
    X = np.ones(SHAPE, np.float32)
    X[2, 3] = value
    return X


GOOD = np.ones(SHAPE, np.float32)
WRONG = {
    "nan": (with_entry(np.nan), GOOD, "X holds NaN"),
    "infinite": (GOOD, with_entry(np.inf), "Y holds NaN or infinite"),
    "other number of samples": (GOOD, GOOD[:-1], "X has 24 samples and Y 23"),
    "one-dimensional": (GOOD[0], GOOD, r"X has shape \(5,\)"),
    "three-dimensional": (GOOD, GOOD[None], r"Y has shape \(1, 24, 5\)"),
    "empty": (GOOD[:0], GOOD[:0], r"X has shape \(0, 5\)"),
    "complex": (GOOD.astype(np.complex64), GOOD, "X is complex64"),
}


@every_measure
@pytest.mark.parametrize(("X", "Y", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_error(name, X, Y, message):
    with pytest.raises(InputError, match=message) as raised:
        MEASURES[name].function(X, Y, **options(name))
    assert "\n" not in str(raised.value)


@every_measure
def test_integers_and_half_precision_are_measured_in_single(name):
    X, Y, _ = related(5)
    X, Y = np.rint(8 * X).astype(np.int32), np.rint(8 * Y)
    single = evaluate(name, X.astype(np.float32), Y.astype(np.float32))
    value = MEASURES[name].function(jnp.asarray(X), jnp.asarray(Y, jnp.bfloat16), **options(name))
    assert value.dtype == jnp.float32 and float(value) == single
