"""Comparison of K models: every option recomputed in numpy, and the algebra that must hold."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.distance import pdist

from recall_jax.errors import InputError
from recall_jax.methods.weights import layer_weights
from recall_jax.similarity.compare import (
    COMPARABLE,
    Comparison,
    check_representations,
    check_samples,
    check_sigma,
    compare_unit,
    compare_units,
    parse_similarity,
    rbf_similarity,
    unit_bandwidth,
)
from recall_jax.similarity.measures import ALIASES

K, U, N, E = 4, 3, 7, 5
seeds = st.integers(0, 2**32 - 1)


def representations(seed, shape=(K, U, N, E)):
    """Models that drift apart with depth from a common one."""
    rng = np.random.default_rng(seed)
    drift = np.linspace(0.1, 1.5, shape[1])[None, :, None, None]
    return (rng.standard_normal((1, *shape[1:])) + drift * rng.standard_normal(shape)).astype(
        np.float32
    )


def rbf64(X, Y, sigma):
    return np.exp(-((X - Y) ** 2).sum(axis=1) / (2 * sigma**2)).mean()


def cosine64(X, Y, sigma):
    norms = np.linalg.norm(X, axis=1) * np.linalg.norm(Y, axis=1)
    return ((X * Y).sum(axis=1) / norms).mean()


def cka64(X, Y, sigma):
    X, Y = X - X.mean(axis=0), Y - Y.mean(axis=0)
    return np.linalg.norm(X.T @ Y) ** 2 / (np.linalg.norm(X.T @ X) * np.linalg.norm(Y.T @ Y))


MEASURES64 = {"rbf": rbf64, "cosine": cosine64, "linear_cka": cka64}


def by_definition(models, similarity, sigma, reference, alignment):
    """One unit, (K, n, E): (similarity (K,), sigma), in float64."""
    models = list(models.astype(np.float64))
    if alignment == "center":
        models = [X - X.mean(axis=0) for X in models]
    pairwise = reference == "pairwise"
    if alignment == "procrustes":
        target = models[reference]
        models = [X @ orthogonal_procrustes(X, target)[0] for X in models]
    if sigma == "median":
        inside = models if pairwise else [models[reference]]
        sigma = np.sqrt(0.5 * np.median(np.concatenate([pdist(X) ** 2 for X in inside])))
    elif sigma == "dim":
        sigma = np.sqrt(models[0].shape[1] / 2)
    total = sum(similarity.values())

    def mixed(X, Y):
        return sum(w * MEASURES64[name](X, Y, sigma) for name, w in similarity.items()) / total

    if not pairwise:
        return [mixed(models[reference], X) for X in models], sigma
    others = [[X for j, X in enumerate(models) if j != k] for k in range(len(models))]
    found = [np.mean([mixed(X, Y) for Y in rest]) for X, rest in zip(models, others, strict=True)]
    return found, sigma


@pytest.mark.parametrize(
    ("similarity", "sigma", "reference", "alignment"),
    [
        ({"rbf": 1.0}, "median", -1, "none"),
        ({"rbf": 1.0}, "median", 1, "none"),
        ({"rbf": 1.0}, "dim", -1, "none"),
        ({"rbf": 1.0}, 2.5, 0, "none"),
        ({"rbf": 1.0}, "median", "pairwise", "none"),
        ({"rbf": 1.0}, 2.5, "pairwise", "center"),
        ({"rbf": 1.0}, "median", -1, "center"),
        ({"rbf": 1.0}, "median", -2, "procrustes"),
        ({"cosine": 1.0}, "median", -1, "none"),
        ({"cosine": 1.0}, "median", -1, "center"),
        ({"linear_cka": 1.0}, "median", "pairwise", "none"),
        ({"linear_cka": 1.0}, "dim", 0, "procrustes"),
        ({"rbf": 0.5, "cosine": 0.5}, "median", -1, "none"),
        ({"rbf": 3.0, "cosine": 1.0, "linear_cka": 2.0}, "median", "pairwise", "center"),
    ],
)
def test_every_option_by_its_definition(similarity, sigma, reference, alignment):
    comparison = Comparison(parse_similarity(similarity), sigma, reference, alignment)
    for seed in range(3):
        reps = representations(seed)
        result = compare_units(reps, comparison)
        assert result.similarity.shape == (K, U) and result.sigma.shape == (U,)
        assert result.similarity.dtype == result.sigma.dtype == jnp.float32
        for unit in range(U):
            expected, width = by_definition(reps[:, unit], similarity, sigma, reference, alignment)
            np.testing.assert_allclose(result.similarity[:, unit], expected, rtol=0, atol=1e-5)
            if "rbf" in similarity:
                np.testing.assert_allclose(result.sigma[unit], width, rtol=1e-5)
            else:
                assert np.isnan(result.sigma[unit])
            alone = compare_unit(reps[:, unit], comparison)
            np.testing.assert_allclose(alone.similarity, result.similarity[:, unit], atol=1e-6)


def test_the_default_is_recall():
    reps = representations(0)
    similarity, sigma = rbf_similarity(reps)
    for unit in range(U):
        expected, width = by_definition(reps[:, unit], {"rbf": 1.0}, "median", -1, "none")
        np.testing.assert_allclose(similarity[:, unit], expected, atol=1e-6)
        np.testing.assert_allclose(sigma[unit], width, rtol=1e-6)
        assert unit_bandwidth(reps[-1, unit]) == sigma[unit]
    # Models of one ancestor grow apart with depth, and a bandwidth for each unit keeps that.
    means = np.asarray(similarity)[:-1].mean(axis=0)
    assert means[0] > means[1] > means[2]


@given(seeds, st.sampled_from(["median", "dim", 0.3]), st.integers(0, K - 1))
def test_the_reference_is_at_one_and_all_lie_between_zero_and_one(seed, sigma, reference):
    reps = representations(seed)
    similarity, _ = rbf_similarity(reps, sigma=sigma, reference=reference)
    np.testing.assert_array_equal(similarity[reference], np.ones(U))
    assert (np.asarray(similarity) >= 0).all() and (np.asarray(similarity) <= 1).all()
    again, _ = rbf_similarity(reps, sigma=sigma, reference=reference - K)
    np.testing.assert_array_equal(again, similarity)


@pytest.mark.parametrize("num_samples", [2, 41, 61, 100])
def test_the_reference_is_at_one_for_any_number_of_samples(num_samples):
    similarity, _ = rbf_similarity(representations(0, (3, 2, num_samples, 4)))
    # XLA multiplies by 1 / n, which may be one rounding below.
    np.testing.assert_allclose(similarity[-1], 1, rtol=0, atol=2**-24)


@given(seeds, st.permutations(range(K)), st.booleans())
def test_permuted_models_permute_similarity_and_weights(seed, order, pairwise):
    reps = representations(seed)
    moved = "pairwise" if pairwise else order.index(K - 1)
    similarity, sigma = rbf_similarity(reps, reference="pairwise" if pairwise else K - 1)
    permuted, same = rbf_similarity(reps[list(order)], reference=moved)
    np.testing.assert_allclose(permuted, np.asarray(similarity)[list(order)], atol=1e-6)
    np.testing.assert_allclose(same, sigma, rtol=1e-6)
    weights = np.asarray(layer_weights(similarity))
    np.testing.assert_allclose(layer_weights(permuted), weights[list(order)], atol=1e-6)


@given(seeds, st.sampled_from([-1, "pairwise"]), st.sampled_from(["none", "center"]))
def test_columns_of_zeros_change_nothing(seed, reference, alignment):
    reps = representations(seed)
    wider = np.pad(reps, ((0, 0), (0, 0), (0, 0), (0, 4)))
    mix = parse_similarity({"rbf": 1.0, "cosine": 1.0, "linear_cka": 1.0})
    comparison = Comparison(mix, "median", reference, alignment)
    before, after = compare_units(reps, comparison), compare_units(wider, comparison)
    np.testing.assert_allclose(after.similarity, before.similarity, atol=1e-5)
    np.testing.assert_allclose(after.sigma, before.sigma, rtol=1e-5)


@given(seeds, st.sampled_from([2.0**-40, 0.37, 2.0**20]), st.sampled_from([-1, "pairwise"]))
def test_a_median_bandwidth_is_blind_to_scale_and_frame(seed, scale, reference):
    reps = representations(seed)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((E, E)))
    moved = (reps @ rotation * scale).astype(np.float32)
    similarity, sigma = rbf_similarity(reps, reference=reference)
    again, scaled = rbf_similarity(moved, reference=reference)
    np.testing.assert_allclose(again, similarity, atol=1e-5)
    np.testing.assert_allclose(scaled, np.asarray(sigma) * scale, rtol=1e-5)


def test_identical_models_are_all_at_one():
    reps = np.repeat(representations(0, (1, U, N, E)), 3, axis=0)
    for reference in (-1, 0, "pairwise"):
        similarity, _ = rbf_similarity(reps, reference=reference)
        np.testing.assert_array_equal(similarity, np.ones((3, U)))


def test_a_model_rotated_away_is_found_by_procrustes_alone():
    reps = representations(0)
    rotation, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((E, E)))
    reps[0] = reps[-1] @ rotation
    plain = compare_units(reps, Comparison()).similarity
    aligned = compare_units(reps, Comparison(alignment="procrustes")).similarity
    assert (np.asarray(plain[0]) < 0.9).all()
    np.testing.assert_allclose(aligned[0], 1, atol=1e-5)
    np.testing.assert_array_equal(aligned[-1], np.ones(U))


def test_a_model_moved_away_is_found_by_center_alone():
    reps = representations(0)
    reps[0] = reps[-1] + 100
    assert (np.asarray(compare_units(reps, Comparison()).similarity[0]) < 1e-6).all()
    centred = compare_units(reps, Comparison(alignment="center")).similarity
    np.testing.assert_allclose(centred[0], 1, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16])
def test_other_dtypes_are_compared_in_float32(dtype):
    reps = representations(0).astype(dtype)
    similarity, sigma = rbf_similarity(reps)
    expected, width = rbf_similarity(reps.astype(np.float32))
    assert similarity.dtype == sigma.dtype == jnp.float32
    np.testing.assert_array_equal(similarity, expected)
    np.testing.assert_array_equal(sigma, width)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((K, N, E), {}, r"shape \(4, 7, 5\): stack them to \(K, U, n, E\)"),
        ((1, U, N, E), {}, "only one model"),
        ((K, U, N, E), {"reference": 4}, "reference 4 is none of the 4 models.*from 0 to 3"),
        ((K, U, N, E), {"reference": -5}, "reference -5 is none of the 4 models"),
        ((K, U, N, E), {"reference": "newest"}, "reference 'newest' is none.*or 'pairwise'"),
        ((K, U, 1, E), {}, "one sample has no pairs to take a median bandwidth from"),
        ((K, U, 1, E), {"reference": "pairwise"}, "one sample has no pairs"),
        ((K, U, N, E), {"sigma": 0.0}, r"sigma is 0\.0: give a number above 0"),
        ((K, U, N, E), {"sigma": -1.0}, "give a number above 0 that float32 holds"),
        ((K, U, N, E), {"sigma": 1e-50}, "give a number above 0 that float32 holds"),
        ((K, U, N, E), {"sigma": 1e50}, "give a number above 0 that float32 holds"),
        ((K, U, N, E), {"sigma": float("nan")}, "give a number above 0"),
        ((K, U, N, E), {"sigma": float("inf")}, "give a number above 0"),
        ((K, U, N, E), {"sigma": "mean"}, "unknown sigma 'mean': use median, dim or a number"),
    ],
)
def test_what_cannot_be_compared(shape, options, message):
    reps = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with pytest.raises(InputError, match=message):
        rbf_similarity(reps, **options)


@pytest.mark.parametrize("sigma", ["dim", 1.5])
def test_one_sample_is_enough_where_no_median_is_taken(sigma):
    similarity, _ = rbf_similarity(representations(0, (K, U, 1, E)), sigma=sigma)
    assert np.isfinite(similarity).all()
    check_representations(representations(0, (K, U, 1, E)), Comparison((("cosine", 1.0),)))


def test_a_median_of_zero_names_the_units():
    reps = representations(0)
    reps[-1, 1, :6] = reps[-1, 1, 0]  # 15 of 21 pairs
    with pytest.raises(InputError, match="zero in unit 1: most samples are alike"):
        rbf_similarity(reps)
    rbf_similarity(reps, sigma=1.0)
    rbf_similarity(reps, reference=0)
    comparison = Comparison()
    with pytest.raises(InputError, match=r"zero in unit embed, head: "):
        check_sigma(np.array([0.0, 1.0, 0.0]), comparison, ["embed", "layers.0", "head"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_representations_that_are_not_finite_are_named(value):
    reps = representations(0)
    reps[1, 2, 3, 4] = value
    with pytest.raises(InputError, match="of model 1 hold NaN or infinity in unit 2"):
        rbf_similarity(reps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"similarity": (("euclid", 1.0),)}, "unknown similarity 'euclid': choose from rbf"),
        ({"similarity": (("rbf", 0.0),)}, "'rbf' has weight 0.0: give one above 0"),
        ({"similarity": (("rbf", float("nan")),)}, "give one above 0"),
        ({"similarity": ()}, "names no measure"),
        ({"alignment": "rotate"}, "unknown alignment 'rotate': choose from none, center"),
        ({"reference": "pairwise", "alignment": "procrustes"}, "pairwise has none"),
    ],
)
def test_what_is_no_comparison(arguments, message):
    with pytest.raises(InputError, match=message):
        Comparison(**arguments)


@pytest.mark.parametrize("name", sorted({*COMPARABLE} - {*ALIASES}))
def test_any_measure_that_grows_to_one_can_weigh_models(name):
    rng = np.random.default_rng(5)
    base = rng.standard_normal((40, 4))
    noise = rng.standard_normal((3, 40, 4)) * np.asarray([1.0, 0.1, 0.0])[:, None, None]
    reps = jnp.asarray(base + noise, jnp.float32)
    far, near, same = compare_unit(reps, Comparison(similarity=((name, 1.0),))).similarity
    assert far < near < same == pytest.approx(1, abs=1e-5)


def test_too_few_samples_for_a_measure_are_named_before_anything_runs():
    with pytest.raises(InputError, match=r"similarity mutual_knn: .*10.*"):
        check_samples(10, Comparison(similarity=(("mutual_knn", 1.0),)))
    check_samples(11, Comparison(similarity=(("mutual_knn", 1.0),)))
