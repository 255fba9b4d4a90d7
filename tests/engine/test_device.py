"""Which tensor is not finite, found in little memory."""

import tracemalloc

import numpy as np
import pytest

from recall_jax.checkpoint.dtypes import DTYPE_OF_NAME
from recall_jax.engine.device import find_not_finite

ELEMENTS = 3 * 2**20 + 5
BEYOND = (
    "NaN or infinite values",
    "NaN, infinite values or numbers beyond float32, in which all is computed",
)
INEXACT = [dtype for name, dtype in DTYPE_OF_NAME.items() if "F" in name]


@pytest.mark.parametrize("dtype", INEXACT, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 2**20, -1])
def test_the_first_tensor_with_such_a_value_is_named(dtype, value, place):
    bad = np.ones(ELEMENTS, dtype)
    bad[place] = value
    good = np.full((2, 3), np.finfo(np.float16).max, dtype)
    assert find_not_finite("m", {"a": good, "b": bad.reshape(1, -1), "c": bad}) == (
        f"m: tensor b holds {BEYOND[dtype == np.float64]}; repair this model"
    )


@pytest.mark.parametrize("dtype", DTYPE_OF_NAME.values(), ids=str)
def test_finite_tensors_of_any_kind_and_shape_have_no_fault(dtype):
    shapes = ((), (0,), (3, 0, 2), (ELEMENTS,))
    assert find_not_finite("m", {str(shape): np.ones(shape, dtype) for shape in shapes}) is None


@pytest.mark.parametrize("dtype", INEXACT, ids=str)
def test_a_large_tensor_takes_little_memory_beside_itself(dtype):
    array = np.zeros((8, 2**20), dtype)
    tracemalloc.start()
    try:
        assert find_not_finite("m", {"a": array}) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * 2**20
