"""CCA, regression, overlap and GULP against scipy and scikit-learn, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import orth, subspace_angles
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import LinearRegression, Ridge
from two_sides import NARROW, SHAPES, WIDE, float64, sides  # noqa: F401

from recall_jax.errors import InputError
from recall_jax.similarity import (
    MEASURES,
    eigenspace_overlap,
    gulp,
    linear_regression,
    mean_cca,
    pwcca,
    svcca,
)
from recall_jax.similarity.blocks import condense


def centred(*arrays):
    return [Z - Z.mean(axis=0) for Z in arrays]


@jax.jit
def all_measures(X, Y):
    """All of them, with both directions of those that have them, in one compilation."""
    return jnp.stack(
        [
            mean_cca(X, Y),
            mean_cca(X, Y, squared=True),
            svcca(X, Y, variance=0.8),
            pwcca(X, Y),
            pwcca(X, Y, weighted_by="y"),
            linear_regression(X, Y),
            linear_regression(Y, X),
            eigenspace_overlap(X, Y, center=True),
            gulp(X, Y),
        ]
    )


def svcca_by_truncation(X, Y, variance):
    kept = []
    for Z in (X, Y):
        U, s, _ = np.linalg.svd(Z, full_matrices=False)
        count = np.argmax(np.cumsum(s**2) / np.sum(s**2) >= variance) + 1
        kept.append(U[:, :count])
    return np.cos(subspace_angles(*kept)).mean()


def pwcca_by_whitening(X, Y):
    """From the symmetric square roots of the covariances; X weighs."""
    roots = []
    for Z in (X, Y):
        values, vectors = np.linalg.eigh(Z.T @ Z)
        kept = values > 1e-10 * values.max()
        roots.append(vectors[:, kept] / np.sqrt(values[kept]))
    U, rho, _ = np.linalg.svd(roots[0].T @ X.T @ Y @ roots[1], full_matrices=False)
    weights = np.abs((X @ roots[0] @ U).T @ X).sum(axis=1)
    return np.sum(weights * rho) / weights.sum()


def ridge_predictor(X, regularization):
    """P (n, n) that takes targets to their ridge predictions from X, of norm one."""
    X = X / np.linalg.norm(X)
    model = Ridge(alpha=regularization, fit_intercept=False, solver="svd", tol=1e-14)
    return model.fit(X, np.eye(len(X))).predict(X)


def by_definition(X, Y):
    x, y = centred(X, Y)
    cosines = np.cos(subspace_angles(orth(x), orth(y)))
    spans = orth(x), orth(y)
    overlap = np.linalg.norm(spans[0].T @ spans[1]) ** 2 / max(len(span.T) for span in spans)
    apart = np.linalg.norm(ridge_predictor(x, 1e-2) - ridge_predictor(y, 1e-2)) ** 2
    explained = [
        LinearRegression().fit(known, target).predict(known) for known, target in [(Y, X), (X, Y)]
    ]
    shares = [
        np.linalg.norm(prediction - target.mean(axis=0)) ** 2 / np.linalg.norm(own) ** 2
        for prediction, target, own in zip(explained, (X, Y), (x, y), strict=True)
    ]
    return [
        cosines.mean(),
        np.mean(cosines**2),
        svcca_by_truncation(x, y, 0.8),
        pwcca_by_whitening(x, y),
        pwcca_by_whitening(y, x),
        *shares,
        overlap,
        apart,
    ]


@SHAPES
def test_each_is_its_definition_by_scipy_and_scikit_learn(shape):
    X, Y = sides(shape)
    values = all_measures(X, Y)
    np.testing.assert_allclose(values, by_definition(X, Y), rtol=1e-9, atol=1e-9)
    if shape == WIDE:  # both span all there is
        np.testing.assert_allclose(values[jnp.array([0, 3, 5, 7])], 1, atol=1e-12)


def test_canonical_correlations_are_scikit_learns():
    X, Y = sides((80, 4, 5))
    x, y = CCA(4, scale=False, max_iter=10000, tol=1e-12).fit_transform(X, Y)
    expected = [np.corrcoef(x[:, i], y[:, i])[0, 1] for i in range(4)]
    assert float(mean_cca(X, Y)) == pytest.approx(np.mean(expected), abs=1e-8)


def test_uncentred_sides_are_compared_by_their_spans():
    X, Y = sides(NARROW)
    cosines = np.cos(subspace_angles(X, Y))
    assert float(mean_cca(X, Y, center=False)) == pytest.approx(cosines.mean(), abs=1e-12)
    overlap = np.sum(cosines**2) / 9
    assert float(eigenspace_overlap(X, Y)) == pytest.approx(overlap, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_features_that_say_nothing_new_change_no_span(dtype):
    X, Y = (Z.astype(dtype) for Z in sides(NARROW))
    more = np.concatenate([X, X[:, :2], X[:, 2:3] - X[:, 3:4], np.full((40, 1), 7)], axis=1)
    more = more.astype(dtype)
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    # What depends on the span of this side alone; PWCCA, where the other one weighs.
    spans, forth, back = [0, 1, 7], [4, 6], [3, 5]
    for kept, pairs in [
        (np.array([*spans, *forth]), ((more, Y), (X, Y))),
        (np.array([*spans, *back]), ((Y, more), (Y, X))),
    ]:
        after, before = (all_measures(*pair)[kept] for pair in pairs)
        np.testing.assert_allclose(after, before, atol=tolerance)


def test_all_variance_keeps_all_components_and_a_small_share_the_first():
    X, Y = sides(NARROW)
    assert float(svcca(X, Y, variance=1.0)) == pytest.approx(float(mean_cca(X, Y)), abs=1e-12)
    first = [np.linalg.svd(Z)[0][:, :1] for Z in centred(X, Y)]
    cosine = np.abs(np.sum(first[0] * first[1]))
    assert float(svcca(X, Y, variance=1e-6)) == pytest.approx(cosine, abs=1e-12)


def test_gulp_is_as_far_as_its_bound_allows_between_sides_without_anything_in_common():
    X = np.kron(np.eye(2), np.ones((2, 1))) @ [[1.0, -1], [-1, 1]]
    Y = np.array([[1.0], [-1], [1], [-1]])
    for regularization in (1e-6, 0.5):
        expected = 2 / (1 + regularization) ** 2
        assert float(gulp(X, Y, regularization)) == pytest.approx(expected, rel=1e-12)
        assert float(gulp(X, 3 * X, regularization)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(6, 4, 4), (4, 6, 6)])
def test_a_constant_side_has_nothing_in_common_with_any(shape):
    X, Y = sides(shape)
    constant = np.ones_like(X)
    for pair in ((constant, Y), (Y, constant), (constant, constant)):
        values = all_measures(*pair)
        assert (values[:-1] == 0).all()
        assert np.isfinite(values[-1])
        assert eigenspace_overlap(0 * pair[0], 0 * pair[1]) == 0
    assert gulp(constant, constant) == 0


def test_condensed_samples_have_the_same_values():
    X, Y = sides((200, 6, 9))
    few = condense(jnp.asarray(X), jnp.asarray(Y), 64)
    np.testing.assert_allclose(all_measures(*few), all_measures(X, Y), rtol=1e-10)
    for name in ("mean_cca", "svcca", "pwcca", "linear_regression", "gulp"):
        assert MEASURES[name].parts.moments
    assert not MEASURES["eigenspace_overlap"].parts.moments  # as it stands, not centred


def test_gradients_are_those_of_finite_differences():
    X, Y = sides(NARROW)
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal(X.shape), rng.standard_normal(Y.shape)
    step = 1e-6
    numeric = all_measures(X + step * x, Y + step * y) - all_measures(X - step * x, Y - step * y)
    by_x, by_y = jax.jit(jax.jacrev(all_measures, argnums=(0, 1)))(X, Y)
    slopes = np.tensordot(by_x, x) + np.tensordot(by_y, y)
    np.testing.assert_allclose(slopes, numeric / (2 * step), rtol=1e-6, atol=1e-8)


def test_wrong_options_are_refused():
    X, Y = sides(NARROW)
    with pytest.raises(InputError, match=r"variance is 1\.5: give the fraction to keep"):
        svcca(X, Y, variance=1.5)
    with pytest.raises(InputError, match="unknown weighted_by 'z': choose x or y"):
        pwcca(X, Y, weighted_by="z")
    with pytest.raises(InputError, match=r"regularization is 0\.0: give a number above 0"):
        gulp(X, Y, regularization=0.0)
