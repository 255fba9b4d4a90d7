"""Matrices of every measure: the values of the pairs, whatever the blocks, devices and widths."""

import jax
import numpy as np
import pytest

from recall_jax.errors import InputError
from recall_jax.similarity.matrix import similarity_matrix
from recall_jax.similarity.measure import SampleSum
from recall_jax.similarity.measures import MEASURES

SAMPLES, WIDTHS = 37, (5, 60)


def sides(*widths, seed=0):
    """Different, and yet alike."""
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(9).standard_normal((SAMPLES, max(WIDTHS)))
    return [
        (common[:, :width] + 0.7 * rng.standard_normal((SAMPLES, width))).astype(np.float32)
        for width in widths
    ]


def by_pairs(name, xs, ys):
    options = {"sigma": 4.0} if name == "paired_rbf" else {}
    function = MEASURES[name].function
    return np.asarray([[function(x, y, **options) for y in ys] for x in xs]), options


def mesh():
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((8,), ("samples",), axis_types=(auto,))


def in_blocks(name):
    """Whether the measure goes through blocks of samples."""
    parts = MEASURES[name].parts
    return isinstance(parts, SampleSum) or parts.moments


def assert_same(name, matrix, expected):
    """But for rounding, whose root is in a distance near zero."""
    power = 2 if MEASURES[name].distance else 1
    expected = expected**power
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(matrix**power, expected, rtol=3e-5, atol=3e-5 * scale)


@pytest.mark.parametrize("name", MEASURES)
def test_entries_are_the_values_of_the_pairs_on_one_device_and_on_eight(name):
    xs = sides(5, 5, 5)
    expected, options = by_pairs(name, xs, xs)
    shared = {"mesh": mesh(), **({"block_size": 3} if in_blocks(name) else {})}
    for kind in ({}, shared):
        matrix = similarity_matrix(np.stack(xs), measure=name, **kind, **options)
        assert matrix.shape == (3, 3) and matrix.dtype == np.float32
        assert_same(name, matrix, expected)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("rbf_cka", True),
        pytest.param("rbf_cka", False, marks=pytest.mark.soak),
        pytest.param("mean_cca", True, marks=pytest.mark.soak),
        ("mean_cca", False),
    ],
)
def test_sides_may_be_others_and_of_several_widths(name, other):
    xs, ys = sides(5, 60, 5), sides(60, 5, seed=1) if other else None
    matrix = similarity_matrix(xs, ys, measure=name)
    assert_same(name, matrix, by_pairs(name, xs, ys or xs)[0])


@pytest.mark.parametrize("block_size", [1, 10, 36])
@pytest.mark.parametrize("name", ["rbf_cka", "gulp"])
def test_the_block_size_does_not_change_a_value(name, block_size):
    xs = sides(5, 5)
    matrix = similarity_matrix(xs, measure=name, block_size=block_size)
    assert_same(name, matrix, similarity_matrix(xs, measure=name))


@pytest.mark.parametrize("name", [name for name in MEASURES if not in_blocks(name)])
def test_what_takes_all_samples_at_once_says_so(name):
    with pytest.raises(InputError, match=f"{name} takes all samples at once: leave out block_size"):
        similarity_matrix(sides(5, 5), measure=name, block_size=10)


def test_without_centring_nothing_is_condensed():
    with pytest.raises(InputError, match="takes all samples at once"):
        similarity_matrix(sides(5, 5), measure="mean_cca", center=False, block_size=10)


def test_options_reach_the_measure():
    x, y = sides(5, 5)
    for name, options in [
        ("rbf_cka", {"threshold": 1.0}),
        ("mutual_knn", {"k": 3, "normalize": False}),
        ("hsic", {"kernel": "rbf", "debiased": True}),
    ]:
        value = similarity_matrix([x], [y], measure=name, **options)
        assert value[0, 0] == pytest.approx(float(MEASURES[name].function(x, y, **options)), 1e-4)
        assert value[0, 0] != pytest.approx(float(MEASURES[name].function(x, y)), 1e-3)


def test_the_bandwidth_of_the_paired_kernel_is_the_median_within_the_first_side():
    x, y = sides(5, 5)
    x64 = x.astype(np.float64)
    first, second = np.triu_indices(SAMPLES, 1)
    for points in (x64, np.concatenate([x64[:1], x64[:-1]])):  # and with a sample twice
        squared = ((points[first] - points[second]) ** 2).sum(axis=1)
        sigma = float(np.sqrt(0.5 * np.median(squared)))
        expected = MEASURES["paired_rbf"].function(points, y, sigma=sigma)
        for block_size in (None, 6):
            matrix = similarity_matrix([points], [y], measure="paired_rbf", block_size=block_size)
            assert matrix[0, 0] == pytest.approx(float(expected), rel=1e-5)


def test_more_samples_than_features_take_the_same_value_from_features():
    rng = np.random.default_rng(3)
    xs = rng.standard_normal((2, 400, 3)).astype(np.float32)
    for name in ("linear_cka", "debiased_linear_cka"):
        expected = MEASURES[name].parts.evaluate(jax.numpy.asarray(xs[0]), jax.numpy.asarray(xs[1]))
        assert similarity_matrix(xs, measure=name)[0, 1] == pytest.approx(float(expected), abs=1e-6)
        assert MEASURES[name].function(*xs) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: similarity_matrix(sides(5, 5), measure="ckaa"), "unknown measure 'ckaa'"),
        (lambda: similarity_matrix(sides(5, 5), k=3), "linear_cka has no option 'k': it has none"),
        (lambda: similarity_matrix(sides(5), measure="rbf_cka", threshold=0), "above 0"),
        (lambda: similarity_matrix([]), "holds no representations"),
        (lambda: similarity_matrix(sides(5), block_size=0), "block_size is 0"),
        (lambda: similarity_matrix(sides(5), [np.ones((3, 5), np.float32)]), "same sample"),
        (lambda: similarity_matrix([*sides(5), np.ones((3, 5))]), r"X\[1\] has 3 samples"),
        (
            lambda: similarity_matrix([*sides(5), np.full((SAMPLES, 5), np.nan)]),
            r"X\[1\] holds NaN",
        ),
        (lambda: similarity_matrix(sides(5, 60), measure="row_cosine"), "of one width"),
        (lambda: similarity_matrix(sides(5)[0]), r"X\[0\] has shape \(5,\)"),
    ],
)
def test_wrong_input_is_named(given, said):
    with pytest.raises(InputError, match=said):
        given()
