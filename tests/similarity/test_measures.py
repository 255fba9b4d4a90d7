"""Measures against scipy, scikit-learn, and their definitions written out in numpy."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm
from scipy.sparse.csgraph import laplacian
from scipy.spatial.distance import pdist, squareform
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics.pairwise import cosine_similarity, rbf_kernel
from sklearn.neighbors import NearestNeighbors, kneighbors_graph

from recall_jax.errors import InputError
from recall_jax.similarity import (
    debiased_linear_cka,
    debiased_rbf_cka,
    distance_correlation,
    hsic,
    imd,
    jaccard_knn,
    linear_cka,
    mutual_knn,
    paired_rbf,
    rbf_cka,
    row_cosine,
    rsa,
    second_order_cosine,
)

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=8)


def float32(*arrays):
    return [array.astype(np.float32) for array in arrays]


def in_float64(measure, X, Y, *args, **options):
    with jax.enable_x64(True):
        return float(measure(X, Y, *args, **options))


def pair(seed, offset=0.0):
    """Two sides (12, 5) at a small, a middling or a large distance."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((12, 5)) + offset
    return float32(X, X + rng.choice([0.01, 0.3, 3.0]) * rng.standard_normal((12, 5)))


def sides(seed):
    """Two related sides (15, 6) and (15, 4), float64."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((15, 6))
    return X, X[:, :4] + rng.standard_normal((15, 4))


def centring(n):
    return np.eye(n) - 1 / n


def linear_kernel(X):
    return X @ X.T


def median_rbf_kernel(X, threshold=0.5):
    squared = squareform(pdist(X, "sqeuclidean"))
    return rbf_kernel(X, gamma=1 / (2 * threshold**2 * np.median(squared)))


def hsic_by_definition(K, L):
    H = centring(len(K))
    return np.trace(K @ H @ L @ H) / (len(K) - 1) ** 2


def unbiased_hsic_by_definition(K, L):
    """Song et al. 2012, eq. 5."""
    n = len(K)
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    one = np.ones(n)
    last = 2 / (n - 2) * (one @ K @ L @ one)
    total = np.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2)) - last
    return total / (n * (n - 3))


def aligned(product, K, L):
    return product(K, L) / np.sqrt(product(K, K) * product(L, L))


def neighbours(X, k, normalize=True):
    """k nearest by cosine or inner product, from scikit-learn's brute force."""
    if normalize:
        found = NearestNeighbors(n_neighbors=k + 1, metric="cosine", algorithm="brute").fit(X)
    else:
        found = NearestNeighbors(
            n_neighbors=k + 1, metric=lambda x, y: 1e3 - x @ y, algorithm="brute"
        ).fit(X)
    order = found.kneighbors(X, return_distance=False)
    return [set([other for other in row if other != i][:k]) for i, row in enumerate(order)]


@given(seeds, st.sampled_from([0.05, 0.7, 20.0]))
def test_paired_rbf_is_the_diagonal_of_scikit_learns_kernel(seed, sigma):
    X, Y = pair(seed)
    kernel = rbf_kernel(X.astype(np.float64), Y.astype(np.float64), gamma=0.5 / sigma**2)
    assert paired_rbf(X, Y, sigma) == pytest.approx(kernel.diagonal().mean(), rel=1e-4, abs=1e-7)


@given(seeds, st.sampled_from([0.0, 10.0, 1000.0]))
def test_an_offset_of_both_sides_costs_paired_measures_no_digits(seed, offset):
    X, Y = pair(seed, offset)
    X64, Y64 = X.astype(np.float64), Y.astype(np.float64)
    squared = ((X64 - Y64) ** 2).sum(axis=1)
    # Direct differences keep their digits wherever the points lie.
    assert paired_rbf(X, Y, 0.7) == pytest.approx(
        np.exp(-squared / 0.98).mean(), rel=1e-5, abs=1e-7
    )
    cosines = cosine_similarity(X64, Y64).diagonal()
    assert row_cosine(X, Y) == pytest.approx(cosines.mean(), abs=1e-6)
    by_features = [Z - Z.mean(axis=0) for Z in (X64, Y64)]
    expected = aligned(lambda K, L: np.sum((K.T @ L) ** 2), *by_features)
    assert linear_cka(X, Y) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("sigma", [1e-30, 1e-6, 1e6, 1e30])
def test_paired_rbf_is_finite_for_any_sigma(sigma):
    X, Y = float32(np.zeros((3, 2)), np.ones((3, 2)))
    assert paired_rbf(X, X, sigma) == 1
    assert paired_rbf(X, Y, sigma) == (0.0 if sigma < 1 else 1.0)


@given(seeds, st.sampled_from([0.01, 0.3, 1.0, 100.0]))
def test_paired_rbf_sees_differences_alone(seed, sigma):
    X, Y = pair(seed)
    value = paired_rbf(X, Y, sigma)
    assert 0 <= value <= 1 and paired_rbf(X, X, sigma) == 1
    assert paired_rbf(Y, X, sigma) == value
    scaled = paired_rbf(4 * X, 4 * Y, 4 * np.float32(sigma))
    assert scaled == pytest.approx(float(value), rel=1e-6)


@few
@given(seeds, st.sampled_from([0.5, 1.0]))
def test_cka_is_the_cosine_of_centred_kernels(seed, threshold):
    X, Y = sides(seed)
    linear = linear_kernel(X), linear_kernel(Y)
    rbf = median_rbf_kernel(X, threshold), median_rbf_kernel(Y, threshold)
    biased, unbiased = hsic_by_definition, unbiased_hsic_by_definition
    for measure, options, product, kernels in [
        (linear_cka, {}, biased, linear),
        (debiased_linear_cka, {}, unbiased, linear),
        (rbf_cka, {"threshold": threshold}, biased, rbf),
        (debiased_rbf_cka, {"threshold": threshold}, unbiased, rbf),
    ]:
        value = in_float64(measure, X, Y, **options)
        assert value == pytest.approx(aligned(product, *kernels), abs=1e-10)


@few
@given(seeds)
def test_hsic_is_its_definition(seed):
    X, Y = sides(seed)
    for kernel, make in [("linear", linear_kernel), ("rbf", median_rbf_kernel)]:
        for debiased, product in [(False, hsic_by_definition), (True, unbiased_hsic_by_definition)]:
            value = in_float64(hsic, X, Y, kernel=kernel, debiased=debiased)
            assert value == pytest.approx(product(make(X), make(Y)), rel=1e-9, abs=1e-12)


@few
@given(seeds)
def test_distance_correlation_is_its_definition(seed):
    X, Y = sides(seed)
    H = centring(len(X))
    A, B = (H @ squareform(pdist(Z)) @ H for Z in (X, Y))
    squared = (A * B).mean() / np.sqrt((A * A).mean() * (B * B).mean())
    assert in_float64(distance_correlation, X, Y) == pytest.approx(np.sqrt(squared), abs=1e-10)
    value = in_float64(distance_correlation, X, Y, squared=True)
    assert value == pytest.approx(squared, abs=1e-10)


@few
@given(seeds)
def test_rsa_is_scipys_correlation_of_scipys_distances(seed):
    X, Y = sides(seed)
    for rdm in ("correlation", "euclidean"):
        distances = pdist(X, rdm), pdist(Y, rdm)
        for compare, correlate in [("spearman", spearmanr), ("pearson", pearsonr)]:
            value = in_float64(rsa, X, Y, rdm=rdm, compare=compare)
            assert value == pytest.approx(correlate(*distances).statistic, abs=1e-10)


def test_rsa_gives_equal_dissimilarities_their_mean_rank():
    rng = np.random.default_rng(3)
    # Signs, as many of each, in 4^3 places: centred, scaled and squared without rounding.
    X, Y = (np.stack([rng.permutation([-1.0, 1.0] * 8) for _ in range(4)], axis=1) for _ in "XY")
    distances = pdist(X), pdist(Y)
    assert len(np.unique(distances[0])) <= 5
    value = in_float64(rsa, X, Y, rdm="euclidean")
    assert value == pytest.approx(spearmanr(*distances).statistic, abs=1e-10)


@few
@given(seeds, st.booleans())
def test_neighbours_are_those_of_scikit_learn(seed, normalize):
    X, Y = sides(seed)
    k = 4
    pairs = list(zip(neighbours(X, k, normalize), neighbours(Y, k, normalize), strict=True))
    options = {"k": k, "normalize": normalize}
    value = in_float64(mutual_knn, X, Y, **options)
    assert value == pytest.approx(np.mean([len(x & y) / k for x, y in pairs]))
    value = in_float64(jaccard_knn, X, Y, **options)
    assert value == pytest.approx(np.mean([len(x & y) / len(x | y) for x, y in pairs]))


@few
@given(seeds)
def test_second_order_cosine_is_its_definition(seed):
    X, Y = sides(seed)
    cosines = cosine_similarity(X), cosine_similarity(Y)
    values = []
    for i, (x, y) in enumerate(zip(neighbours(X, 4), neighbours(Y, 4), strict=True)):
        either = sorted(x | y)
        values.append(cosine_similarity(*(matrix[i : i + 1, either] for matrix in cosines))[0, 0])
    value = in_float64(second_order_cosine, X, Y, k=4)
    assert value == pytest.approx(np.mean(values), abs=1e-10)


def test_of_equal_neighbours_the_first_count():
    X = np.zeros((5, 2), np.float32)  # everyone's neighbours: the first two others
    Y = np.asarray([[1, 0], [1, 0.1], [1, 0.2], [0, 1], [0.1, 1]], np.float32)
    ours = [{1, 2}, {0, 2}, {0, 1}, {0, 1}, {0, 1}]
    shared = [len(x & y) for x, y in zip(ours, neighbours(Y.astype(np.float64), 2), strict=True)]
    assert mutual_knn(X, Y, k=2) == pytest.approx(np.mean(shared) / 2)


def heat_by_definition(X, k):
    graph = kneighbors_graph(X, k).toarray()
    L = laplacian(np.maximum(graph, graph.T), normed=True)
    return lambda t: np.trace(expm(-t * L)) / len(X)


@settings(max_examples=3)
@given(seeds)
def test_imd_is_its_definition(seed):
    X, Y = sides(seed)
    x, y = heat_by_definition(X, 5), heat_by_definition(Y, 5)
    times = np.logspace(-1, 1, 256)
    expected = max(np.exp(-2 * (t + 1 / t)) * abs(x(t) - y(t)) for t in times)
    assert in_float64(imd, X, Y) == pytest.approx(expected, rel=1e-8)


def test_imd_needs_no_samples_in_common_order():
    X, Y = sides(0)
    value = in_float64(imd, X, Y)
    assert in_float64(imd, X[::-1], Y) == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize("measure", [mutual_knn, jaccard_knn, second_order_cosine, imd])
@pytest.mark.parametrize("k", [15, 2.5, 0, -1])
def test_k_is_a_whole_number_below_that_of_samples(measure, k):
    X, Y = float32(*sides(0))
    with pytest.raises(InputError, match=f"k is {k}: give"):
        measure(X, Y, k=k)


def test_an_unknown_word_is_refused_with_the_known_ones():
    X, Y = float32(*sides(0))
    with pytest.raises(InputError, match="unknown rdm 'cosine': choose correlation or euclidean"):
        rsa(X, Y, rdm="cosine")
    with pytest.raises(InputError, match="unknown compare 'kendall': choose spearman or pearson"):
        rsa(X, Y, compare="kendall")
    with pytest.raises(InputError, match="unknown kernel 'distance': choose linear or rbf"):
        hsic(X, Y, kernel="distance")


@pytest.mark.parametrize("measure", [linear_cka, rbf_cka, debiased_linear_cka, row_cosine, rsa])
def test_nothing_is_similar_to_a_side_without_variance(measure):
    rng = np.random.default_rng(0)
    X, Y = np.zeros((6, 3), np.float32), rng.standard_normal((6, 3)).astype(np.float32)
    assert measure(X, Y) == 0 and measure(Y, X) == 0 and measure(X, X) == 0
