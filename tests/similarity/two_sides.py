"""Pairs of sides that shape measures and spans are tested on, in float64."""

import jax
import numpy as np
import pytest

NARROW, MIXED, WIDE = (40, 6, 9), (15, 40, 6), (12, 20, 30)
SHAPES = pytest.mark.parametrize("shape", [NARROW, MIXED, WIDE], ids=["narrow", "mixed", "wide"])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def sides(shape, seed=0):
    n, first, second = shape
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((n, 5))
    X = common @ rng.standard_normal((5, first)) + rng.standard_normal((n, first)) + 2
    Y = common @ rng.standard_normal((5, second)) + 0.5 * rng.standard_normal((n, second)) - 1
    return X, Y
