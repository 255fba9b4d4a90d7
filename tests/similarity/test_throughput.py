"""What a measure costs at least, and what its time is held against."""

import jax
import numpy as np

from recall_jax.similarity import MEASURES
from recall_jax.similarity.matrix import similarity_matrix
from recall_jax.similarity.operations import operations
from recall_jax.similarity.plain import NUMPY, SCIKIT_LEARN
from recall_jax.similarity.throughput import Shape, matmul_roof, representations


def test_the_definitions_give_what_ours_give():
    assert NUMPY.keys() <= MEASURES.keys() and SCIKIT_LEARN.keys() <= NUMPY.keys()
    (X,), (Y,) = representations(Shape(60, 24, 1))
    for name in NUMPY:
        ours = similarity_matrix(X[None], Y[None], measure=name)[0, 0]
        for table in (NUMPY, SCIKIT_LEARN):
            if name in table:
                np.testing.assert_allclose(table[name](X, Y), ours, rtol=2e-4, err_msg=name)


def test_every_measure_has_its_count_and_it_grows_with_the_work():
    for name in MEASURES:
        count = operations(name, 100, 64, 2)
        assert count > 0
        assert operations(name, 200, 64, 2) > count
        assert operations(name, 100, 128, 2) > count
        assert operations(name, 100, 64, 3) > count


def test_counts_of_products_are_those_of_xla():
    n, width = 64, 32
    X, Y = representations(Shape(n, width, 1))
    row_cosine = operations("row_cosine", n, width, 1)
    assert row_cosine == 2 * n * width
    counted = jax.jit(lambda X, Y: X @ X.T).lower(X[0], Y[0]).compile().cost_analysis()["flops"]
    kernels = operations("hsic", n, width, 1)
    assert kernels == 2 * counted + 2 * n * n


def test_the_roof_is_that_of_a_product_wide_enough_to_time():
    rate, width = matmul_roof(repeat=1)
    assert width >= 2048 and rate > 0
