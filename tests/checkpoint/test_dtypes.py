"""What is a float is told without JAX, and as JAX tells it."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from recall_jax.checkpoint.dtypes import DTYPE_OF_NAME, DTYPES, NAME_OF_DTYPE, is_float

NUMPY = sorted({np.dtype(kind) for kind in np.sctypeDict.values()}, key=str)
NARROW = [np.dtype(each) for each in vars(ml_dtypes).values() if isinstance(each, type)
          and issubclass(each, np.generic)]  # fmt: skip


def test_there_are_types_of_all_kinds():
    assert {dtype.kind for dtype in NUMPY} >= set("biufcOSUVMm")
    names = {dtype.name for dtype in NARROW}
    assert names >= {"bfloat16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int4", "uint2"}


@pytest.mark.parametrize("dtype", [*NUMPY, *NARROW], ids=str)
def test_a_float_is_what_jax_calls_one(dtype):
    assert is_float(dtype) == jnp.issubdtype(dtype, jnp.floating)


def test_outputs_may_be_of_every_float_that_is_written():
    assert set(DTYPES.values()) == {dtype for dtype in DTYPE_OF_NAME.values() if is_float(dtype)}
    assert all(dtype.name == name and dtype in NAME_OF_DTYPE for name, dtype in DTYPES.items())
