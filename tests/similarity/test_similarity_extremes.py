"""Measures where floating point is short of range or digits, and inputs of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recall_jax.errors import InputError
from recall_jax.similarity import (
    debiased_rbf_cka,
    gulp,
    hsic,
    linear_cka,
    mean_cca,
    mutual_knn,
    paired_rbf,
    procrustes_distance,
    rbf_cka,
    similarity_matrix,
    size_and_shape_distance,
    svcca,
)
from recall_jax.similarity.measures import MEASURES

# These count, rank or sort, so that NaN has a place among numbers there.
COUNTING = {"mutual_knn", "jaccard_knn", "second_order_cosine", "imd"}
SMOOTH = ["linear_cka", "rbf_cka", "distance_correlation", "angular_procrustes", "gulp"]


def pair(seed=0, samples=24, widths=(3, 4)):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((samples, width)).astype(np.float32) for width in widths]


@pytest.mark.parametrize("name", sorted(set(MEASURES) - COUNTING))
def test_nan_stays_nan_where_values_cannot_be_looked_at(name):
    X, Y = pair(widths=(3, 3))
    options = {"sigma": 1.0} if name == "paired_rbf" else {}
    measure = jax.jit(lambda x, y: MEASURES[name].function(x, y, **options))
    assert np.isfinite(measure(X, Y))
    assert np.isnan(measure(X * np.nan, Y))


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e20, 1e25])
def test_scale_alone_changes_no_digit(scale):
    X, Y = pair()
    far = X * np.float32(scale)
    assert size_and_shape_distance(far, Y * np.float32(scale)) == pytest.approx(
        float(size_and_shape_distance(X, Y)) * scale, rel=1e-5
    )
    for measure in (rbf_cka, procrustes_distance, gulp):
        assert measure(far, Y) == pytest.approx(float(measure(X, Y)), rel=1e-4)
    assert hsic(far, Y, kernel="rbf") == pytest.approx(float(hsic(X, Y, kernel="rbf")), rel=1e-5)
    assert mutual_knn(far, Y, normalize=False) == mutual_knn(X, Y, normalize=False)
    sides = np.stack([X, X + Y[:, :3]])
    near, same = (
        np.asarray(similarity_matrix(s, measure="paired_rbf"))
        for s in (sides, sides * np.float32(scale))
    )
    assert same == pytest.approx(near, rel=1e-5)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_of_small_inputs_are_those_of_large_ones(name):
    X, Y = pair()
    slope = jax.grad(lambda x: MEASURES[name].function(x, Y))
    expected = np.asarray(slope(X))
    small = np.asarray(slope(X * np.float32(1e-20)) * np.float32(1e-20))
    assert small == pytest.approx(expected, rel=1e-3, abs=1e-4 * float(np.abs(expected).max()))


def test_samples_that_are_mostly_the_same_have_the_value_of_float64():
    X, Y = pair(samples=60, widths=(768, 20))
    X[12:] = X[11]
    for measure in (rbf_cka, MEASURES["distance_correlation"].function):
        single = float(measure(X, Y))
        with jax.enable_x64(True):
            double = float(measure(X.astype(np.float64), Y.astype(np.float64)))
        assert single == pytest.approx(double, abs=1e-4)


@pytest.mark.parametrize("threshold", [100.0, 1e3, 1e5])
def test_a_kernel_that_is_nearly_constant_keeps_its_digits(threshold):
    X, Y = pair()
    for measure in (rbf_cka, debiased_rbf_cka):
        single = float(measure(X, Y, threshold=threshold))
        with jax.enable_x64(True):
            double = float(measure(*(Z.astype(np.float64) for Z in (X, Y)), threshold=threshold))
        assert single == pytest.approx(double, abs=1e-4)


def test_all_of_the_variance_is_every_component():
    rng = np.random.default_rng(0)
    X = (rng.standard_normal((80, 30)) * np.logspace(0, -4, 30)).astype(np.float32)
    Y = X + 1e-3 * rng.standard_normal(X.shape).astype(np.float32)
    assert svcca(X, Y, variance=1.0) == pytest.approx(float(mean_cca(X, Y)), abs=1e-6)
    assert svcca(X, Y, variance=0.99) > mean_cca(X, Y) + 0.05


def test_one_sample_that_outweighs_all_others_costs_no_digits():
    X, Y = pair(samples=200, widths=(5, 5))
    X[0] *= 1e3
    function = MEASURES["debiased_linear_cka"].function
    with jax.enable_x64(True):
        double = float(function(X.astype(np.float64), Y.astype(np.float64)))
    assert function(X, Y) == pytest.approx(double, abs=1e-4)


def test_sides_of_any_real_dtype_are_brought_to_one():
    X, Y = pair()
    expected = float(linear_cka(np.round(X * 100), Y))
    whole = np.round(X * 100)
    for other in (whole.astype(np.int64), whole.tolist()):
        assert linear_cka(other, Y) == pytest.approx(expected, abs=1e-6)
    assert linear_cka(whole.astype(np.int64) * 2**31, Y) == pytest.approx(expected, abs=1e-6)
    assert linear_cka(jnp.asarray(X, jnp.bfloat16), Y).dtype == np.float32
    with jax.enable_x64(True):
        wide = Y.astype(np.float64)
        assert linear_cka(X, wide).dtype == similarity_matrix([X, wide]).dtype == np.float64
        assert similarity_matrix([X], [wide]).dtype == np.float64


def test_options_may_be_scalars_of_numpy_and_jax():
    X, Y = pair(widths=(3, 3))
    assert rbf_cka(X, Y, threshold=np.float64(0.5)).dtype == np.float32
    assert mutual_knn(X, Y, k=np.int32(3)) == mutual_knn(X, Y, k=3)
    assert gulp(X, Y, regularization=jnp.float32(0.1)) == gulp(X, Y, regularization=0.1)
    matrix = similarity_matrix([X], [Y], measure="paired_rbf", sigma=jnp.float32(2))
    assert matrix[0, 0] == pytest.approx(float(paired_rbf(X, Y, 2.0)), rel=1e-6)
    given = similarity_matrix([X], [Y], measure="paired_rbf", sigma=None)
    assert given == similarity_matrix([X], [Y], measure="paired_rbf")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda X, Y: paired_rbf(X, X, None), "sigma is None: give a number above 0"),
        (lambda X, Y: paired_rbf(X, X, "median"), "sigma is 'median': give a number above 0"),
        (lambda X, Y: mutual_knn(X, Y, k=2.5), "k is 2.5: give a whole number above 0"),
        (lambda X, Y: procrustes_distance(X, Y, center="no"), "center is 'no': give True or False"),
        (lambda X, Y: hsic(X, Y, kernel="foo"), "unknown kernel 'foo'"),
        (lambda X, Y: similarity_matrix([X], [Y], measure="hsic", kernel="foo"), "unknown kernel"),
        (lambda X, Y: similarity_matrix([X], [Y], block_size=7.0), "block_size is 7.0"),
        (lambda X, Y: similarity_matrix("abc"), "X is a text"),
        (lambda X, Y: similarity_matrix(np.zeros((2, 24, 0))), "has shape"),
        (lambda X, Y: linear_cka(X > 0, Y), "X is bool: give representations of real numbers"),
    ],
)
def test_other_input_is_one_error(call, said):
    with pytest.raises(InputError, match=said):
        call(*pair())


def test_a_mesh_as_jax_makes_it_will_do_but_of_one_axis():
    sides = np.stack(pair(widths=(3, 3)))
    matrix = similarity_matrix(sides, measure="rbf_cka", mesh=jax.make_mesh((4,), ("devices",)))
    assert matrix == pytest.approx(np.asarray(similarity_matrix(sides, measure="rbf_cka")), 1e-5)
    with pytest.raises(InputError, match="give one with a single axis"):
        similarity_matrix(sides, mesh=jax.make_mesh((2, 2), ("a", "b")))


@pytest.mark.parametrize("regularization", [1e-42, 1e-30])
def test_a_ridge_too_small_to_matter_is_none(regularization):
    X, Y = pair(samples=6, widths=(20, 3))
    assert gulp(X, Y, regularization=regularization) == pytest.approx(2, abs=1e-3)
