"""Per-unit analyses against scikit-learn and against sums by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score
from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from recall_jax.errors import InputError
from recall_jax.experiments.ablation.clusterings import coverage, mutual_information
from recall_jax.experiments.ablation.domains import domain_similarity, neighbour_accuracy


def states_of(seed: int, apart: float = 1.0, n: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Three domains of n texts in all, their centres so far apart, and far from the origin."""
    generator = np.random.default_rng(seed)
    domains = generator.permutation(np.arange(n) % 3)
    centres = apart * generator.normal(size=(3, 5))
    return (centres[domains] + generator.normal(size=(n, 5)) + 50).astype(np.float32), domains


@pytest.mark.parametrize(("seed", "k"), [(0, 1), (1, 4), (2, 5)])
def test_neighbours_vote_as_scikit_learn_has_them(seed, k):
    states, domains = states_of(seed)
    voter = KNeighborsClassifier(k, algorithm="brute")
    told = cross_val_predict(voter, states.astype(np.float64), domains, cv=LeaveOneOut())
    assert neighbour_accuracy(states, domains, k) == np.mean(told == domains)


@pytest.mark.parametrize("seed", range(3))
def test_similarity_within_and_across_is_the_mean_of_the_kernel(seed):
    states, domains = states_of(seed)
    wide = states.astype(np.float64)
    above = np.triu_indices(len(wide), 1)
    kernel = rbf_kernel(wide, gamma=1 / np.median(euclidean_distances(wide)[above] ** 2))[above]
    same = domains[above[0]] == domains[above[1]]
    found = domain_similarity(states, domains)
    np.testing.assert_allclose(found.within, kernel[same].mean(), rtol=1e-9)
    np.testing.assert_allclose(found.across, kernel[~same].mean(), rtol=1e-9)


def test_domains_far_apart_are_told_and_one_heap_is_not():
    far, near = states_of(0, apart=30.0, n=90), states_of(0, apart=0.0, n=90)
    assert neighbour_accuracy(*far) == 1.0
    assert neighbour_accuracy(*near) < 0.6
    assert domain_similarity(*far).within > domain_similarity(*far).across + 0.3
    assert abs(np.diff(domain_similarity(*near))[0]) < 0.05


def test_states_that_coincide_have_no_similarity():
    assert np.isnan(domain_similarity(np.ones((6, 3), np.float32), np.arange(6) % 2)).all()


labels = st.lists(st.integers(0, 4), min_size=2, max_size=40)


@given(labels, st.randoms(use_true_random=False))
def test_mutual_information_is_that_of_scikit_learn(clusters, random):
    domains = [0, 1, *(random.randrange(3) for _ in clusters[2:])]
    found = mutual_information(np.asarray(clusters), np.asarray(domains))
    np.testing.assert_allclose(found.nats, mutual_info_score(clusters, domains), atol=1e-12)
    np.testing.assert_allclose(
        found.normalised, normalized_mutual_info_score(clusters, domains), atol=1e-12
    )


def test_coverage_is_the_distance_to_the_nearest_in_spreads():
    states, _ = states_of(1)
    units = np.stack([states, 7 * states])  # the scale of a unit does not matter
    typical = [0, 4]
    spread = np.sqrt(((states - states.mean(axis=0)) ** 2).sum(axis=1).mean())
    nearest = euclidean_distances(states, states[typical]).min(axis=1) / spread
    found = coverage(units, units[:, typical])
    np.testing.assert_allclose(found.mean, nearest.mean(), rtol=1e-4)
    np.testing.assert_allclose(found.farthest, nearest.max(), rtol=1e-4)


def test_coverage_of_every_text_is_complete_and_more_samples_cover_more():
    states, _ = states_of(2)
    np.testing.assert_allclose(coverage(states[None], states[None]), 0, atol=1e-6)
    means = [coverage(states[None], states[None, :count]).mean for count in (1, 5, 15)]
    assert means[0] > means[1] > means[2] > 0


def test_clusters_cover_more_than_chance():
    states, domains = states_of(3, apart=30.0, n=90)
    one_of_each = states[[int(np.argmax(domains == domain)) for domain in range(3)]]
    found = coverage(states[None], one_of_each[None])
    assert found.mean < 0.75 * found.random


def test_nothing_to_cover_is_said():
    with pytest.raises(InputError, match="has the same states: give other rows"):
        coverage(np.ones((2, 6, 3)), np.ones((2, 1, 3)))
