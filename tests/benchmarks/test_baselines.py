"""What the benchmarks compare with: the same values, and only what is installed."""

import numpy as np
from baselines import NUMPY, SCIKIT_LEARN
from libraries import ADAPTERS

from recall_jax.similarity import MEASURES, plain
from recall_jax.similarity.matrix import similarity_matrix
from recall_jax.similarity.plain import LibraryLoader, find_libraries
from recall_jax.similarity.throughput import Shape, representations, run_benchmark


def test_the_definitions_give_what_ours_give():
    assert NUMPY.keys() == MEASURES.keys() and SCIKIT_LEARN.keys() <= MEASURES.keys()
    (X,), (Y,) = representations(Shape(60, 24, 1))
    for name in MEASURES:
        ours = similarity_matrix(X[None], Y[None], measure=name)[0, 0]
        for table in (NUMPY, SCIKIT_LEARN):
            if name in table:
                np.testing.assert_allclose(table[name](X, Y), ours, rtol=2e-4, err_msg=name)


def test_all_that_is_plain_is_compared_with():
    assert plain.NUMPY.items() <= NUMPY.items()
    assert plain.SCIKIT_LEARN.items() <= SCIKIT_LEARN.items()


def test_what_is_not_installed_is_named():
    absent = LibraryLoader("ReSi", "no_such_package", dict)
    found, missing = find_libraries([*ADAPTERS[:2], absent])
    assert [library.name for library in found] == ["numpy", "scikit-learn"]
    assert missing == ["no comparison with ReSi: not installed"]


def test_a_measure_beside_all_that_there_is():
    found = run_benchmark(["gulp"], [Shape(32, 16, 2)], repeat=1, adapters=ADAPTERS[:2])
    (case,) = found.cases
    (numpy,) = case.others
    assert numpy.name == "numpy" and numpy.error is None
    np.testing.assert_allclose(numpy.value, case.value, rtol=1e-3)
