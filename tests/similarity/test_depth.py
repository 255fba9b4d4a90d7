import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.similarity.depth import (
    falls_at_both_ends,
    falls_with_depth,
    matching_depths,
    spearman_with_depth,
)

CURVES = {
    "a sharp fall at both ends": ([0.3, 0.9, 0.92, 0.91, 0.9, 0.4], True),
    "a fall over the last two steps": ([0.3, 0.9, 0.91, 0.9, 0.92, 0.91, 0.9, 0.6, 0.4], True),
    "a fall at the first step alone": ([0.3, 0.9, 0.92, 0.91, 0.9, 0.9], False),
    "a fall at the last step alone": ([0.9, 0.9, 0.92, 0.91, 0.9, 0.4], False),
    "a steady rise and fall": (1 - np.abs(np.linspace(-1, 1, 12)), False),
    "a rise": (np.linspace(0.1, 0.9, 12), False),
    "peaks at both ends": ([0.9, 0.3, 0.31, 0.3, 0.32, 0.9], False),
    "no change": ([0.5] * 8, False),
    "no more than rounding": ([1 - 1e-6, *[1.0] * 6, 1 - 1e-6], False),
    "equal steps between": ([0.7, *[0.9] * 6, 0.8], True),
}


@pytest.mark.parametrize("case", CURVES)
def test_a_sharp_fall_at_both_ends(case):
    values, seen = CURVES[case]
    values = np.asarray(values, np.float32)
    found = falls_at_both_ends(values, distance=False, scale=1.0)
    assert found.seen is seen
    assert (found.first, found.last) == (values[0], values[-1])
    assert found.lower_quartile == pytest.approx(np.quantile(values[1:-1], 0.25))
    assert found.upper_quartile == pytest.approx(np.quantile(values[1:-1], 0.75))
    # a distance rises where a similarity falls
    assert falls_at_both_ends(1 - values, distance=True, scale=1.0).seen is seen
    if seen:
        assert not falls_at_both_ends(values, distance=True, scale=1.0).seen


def test_a_fall_with_depth():
    falling = np.asarray([1.0, 0.9, 0.95, 0.7, 0.6], np.float32)
    found = falls_with_depth(falling, distance=False, scale=1.0)
    assert found.seen and found.spearman == pytest.approx(-0.9)
    assert (found.first, found.last) == (1.0, np.float32(0.6))
    assert not falls_with_depth(falling[::-1], distance=False, scale=1.0).seen
    assert falls_with_depth(falling[::-1], distance=True, scale=1.0).seen
    assert not falls_with_depth(falling, distance=True, scale=1.0).seen
    # there and back: no trend
    assert not falls_with_depth(np.asarray([1, 0.6, 0.4, 0.6, 1.0]), distance=False, scale=1.0).seen
    assert not falls_with_depth(np.full(9, 0.5), distance=False, scale=1.0).seen
    # in order, but by no more than rounding
    assert not falls_with_depth(1 - 1e-6 * np.arange(8), distance=False, scale=1.0).seen
    # a small fall is one where all values are small
    assert falls_with_depth(1e-6 * np.arange(8)[::-1], distance=False, scale=1e-5).seen


def test_what_cannot_be_asked_is_not_answered():
    assert falls_at_both_ends(np.asarray([0.1, 0.9, 0.9, 0.1]), distance=False, scale=1.0) is None
    assert falls_with_depth(np.asarray([0.9, 0.5, 0.1]), distance=False, scale=1.0) is None
    for hole in (np.nan, np.inf):
        values = np.asarray([0.1, 0.9, hole, 0.9, 0.9, 0.1])
        assert falls_at_both_ends(values, distance=False, scale=1.0) is None
        assert falls_with_depth(values, distance=False, scale=1.0) is None


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30))
def test_spearman_is_scipys(values):
    if len(set(values)) == 1:
        assert spearman_with_depth(np.asarray(values)) == 0
        return
    expected = scipy.stats.spearmanr(values, range(len(values))).statistic
    assert spearman_with_depth(np.asarray(values)) == pytest.approx(expected, abs=1e-12)


def test_depths_match_by_name_else_by_place():
    assert matching_depths("abc", "abc") == [0, 1, 2]
    assert matching_depths("abc", "vwxyz") == [0, 2, 4]
    assert matching_depths("vwxyz", "abc") == [0, 1, 1, 2, 2]
    assert matching_depths("a", "xyz") == [2]
    assert matching_depths("xyz", "a") == [0, 0, 0]


@given(st.integers(2, 60), st.integers(1, 60))
def test_both_ends_match_and_order_is_kept(units, others):
    places = matching_depths([f"a{i}" for i in range(units)], [f"b{i}" for i in range(others)])
    assert places[0] == 0 and places[-1] == others - 1
    assert places == sorted(places)
