"""Measures against values that other software gave for the same inputs.

Set A was computed with independent published software, and where libraries disagree with numpy from
the definition; set B was published, to five digits, with the original CKA code (Kornblith et al.
2019), whose centred CCA follows numpy again.
"""

import math

import jax
import numpy as np
import pytest

from recall_jax import similarity
from recall_jax.similarity import paired_rbf

pytestmark = pytest.mark.optimised


def inputs_a():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((64, 16))
    Y = rng.standard_normal((64, 24))
    return {"X": X, "Y": Y, "Z": X + 0.1 * rng.standard_normal((64, 16))}


def inputs_b():
    rng = np.random.RandomState(1337)
    X = rng.randn(100, 10)
    return {"X": X, "Y": rng.randn(100, 10) + X}


A, B = inputs_a(), inputs_b()

VALUES_A = [
    ("linear_cka", {}, 0.274512070083),
    ("rbf_cka", {"threshold": 0.5}, 0.720495008336),
    ("rbf_cka", {"threshold": 1.0}, 0.385490989045),
    ("debiased_linear_cka", {}, 0.057964499756),
    ("debiased_rbf_cka", {"threshold": 0.5}, 0.055294155509),
    ("procrustes_distance", {}, 1.01992738713),
    ("angular_procrustes", {}, 1.070285165157),
    ("size_and_shape_distance", {}, 36.544115752651),
    ("mean_cca", {}, 0.614974443083),
    ("mean_cca", {"squared": True}, 0.424064259471),
    ("svcca", {"variance": 0.99}, 0.60119326343),  # 16 and 23 components
    ("pwcca", {"weighted_by": "x"}, 0.621314330513),
    ("pwcca", {"weighted_by": "y"}, 0.626257086364),
    ("rsa", {"rdm": "correlation", "compare": "spearman"}, 0.080532546204),
    ("rsa", {"rdm": "correlation", "compare": "pearson"}, 0.073785730937),
    ("mutual_knn", {"k": 10}, 0.1703125),
    ("mutual_knn", {"k": 10, "normalize": False}, 0.171875),
    ("jaccard_knn", {"k": 10}, 0.097269253096),
    ("aligned_cosine", {}, 0.481764450677),
]
VALUES_A_Z = [
    ("paired_rbf", {"sigma": 1.0}, 0.922676199518),
    ("row_cosine", {}, 0.994324410906),
]
VALUES_B = [
    ("linear_cka", {}, 0.55761),
    ("rbf_cka", {"threshold": 0.5}, 0.65483),
    ("debiased_linear_cka", {}, 0.51346),
    ("mean_cca", {"squared": True, "center": False}, 0.54312),
    ("mean_cca", {"squared": True}, 0.545396),
]
CASES = [
    *((name, options, A["X"], A["Y"], value, 1e-6) for name, options, value in VALUES_A),
    *((name, options, A["X"], A["Z"], value, 1e-6) for name, options, value in VALUES_A_Z),
    *((name, options, B["X"], B["Y"], value, 6e-6) for name, options, value in VALUES_B),
]


@pytest.mark.parametrize(
    ("name", "options", "X", "Y", "value", "tolerance"),
    CASES,
    ids=[f"{name}-{options}-{value}" for name, options, _, _, value, _ in CASES],
)
def test_a_measure_gives_the_known_value_in_either_precision(name, options, X, Y, value, tolerance):
    measure = getattr(similarity, name)
    with jax.enable_x64(True):
        double = measure(X, Y, **options)
    assert double.dtype == np.float64 and double.shape == ()
    assert float(double) == pytest.approx(value, abs=tolerance, rel=0)
    single = measure(X.astype(np.float32), Y.astype(np.float32), **options)
    assert single.dtype == np.float32
    assert float(single) == pytest.approx(value, abs=1e-4, rel=0)


def test_the_nuclear_norm_stands_behind_both_procrustes_measures():
    nuclear = 0.479874062491  # of the centred, padded sides of norm one
    with jax.enable_x64(True):
        distance = float(similarity.procrustes_distance(A["X"], A["Y"]))
        angle = float(similarity.angular_procrustes(A["X"], A["Y"]))
    assert 1 - distance**2 / 2 == pytest.approx(nuclear, abs=1e-6)
    assert math.cos(angle) == pytest.approx(nuclear, abs=1e-6)


def test_the_mean_of_the_whole_rbf_matrix_is_that_of_all_pairings():
    with jax.enable_x64(True):
        shifted = [paired_rbf(A["X"], np.roll(A["Z"], shift, axis=0), 1.0) for shift in range(64)]
    assert np.mean(shifted) == pytest.approx(0.014645907781, abs=1e-6)
