"""Transfer checkpoint tensors to the device, and word the errors for values that are not finite."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

_PIECE = 2**19  # elements checked at a time, so that no full copy of a tensor is made


def find_not_finite(model: str, tensors: Mapping[str, Any]) -> str | None:
    """Return the error message for the first tensor not finite in float32, or None."""
    for name, array in tensors.items():
        if not all_finite(array, narrow=True):
            return not_finite_message(model, name, array.dtype)
    return None


def all_finite(array: Any, *, narrow: bool = False) -> bool:
    """Return whether no element is NaN or infinite; with `narrow`, also after a cast to float32."""
    elements = np.asarray(array).reshape(-1)
    starts = range(0, elements.size, _PIECE)
    return all(_all_finite(elements[start : start + _PIECE], narrow) for start in starts)


def _all_finite(elements: np.ndarray, narrow: bool) -> bool:
    if elements.dtype == ml_dtypes.bfloat16:  # six times as fast by the exponent bits
        return not ((elements.view(np.uint16) & 0x7F80) == 0x7F80).any()
    if narrow and elements.dtype == np.float64:
        with np.errstate(over="ignore"):
            elements = elements.astype(np.float32)
    return bool(np.isfinite(elements).all())


def not_finite_message(model: str, name: str, dtype: Any) -> str:
    """Return the error message for a tensor that is not finite in float32."""
    what = "NaN or infinite values"
    if dtype == np.float64:
        what = "NaN, infinite values or numbers beyond float32, in which all is computed"
    return f"{model}: tensor {name} holds {what}; repair this model"


def states_overflow_message(model: str, unit: str) -> str:
    """Return the error message for hidden states that overflow in a unit with finite tensors."""
    return (
        f"{model}: hidden states overflow in unit {unit}, though the weights of this unit are "
        "finite: check the other units with recall verify"
    )


def overflow_message(name: str, dtype: np.dtype[Any]) -> str:
    """Return the error message for a tensor that overflows when finite models are merged."""
    if dtype == np.float16:
        return (
            f"{name} overflows {dtype} once merged: choose a wider out_dtype, such as bfloat16 or "
            "float32"
        )
    return (
        f"{name} overflows float32, in which all is computed, once merged: the models' values or "
        "the recipe's are too large"
    )


def common_dtype(arrays: Sequence[Any]) -> np.dtype[Any]:
    """Return the narrowest dtype that holds all values of the arrays, such as float32 for a mix."""
    with jax.numpy_dtype_promotion("standard"):
        return reduce(jnp.promote_types, [array.dtype for array in arrays])


def to_device(array: np.ndarray, device: jax.Device) -> jax.Array:
    """Return a checkpoint tensor on a device, cast from float64 to float32.

    On CPU a tensor that is aligned in its file is used where it is mapped, without a copy.
    """
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):  # gives infinity, which the forward detects
            array = array.astype(np.float32)
    return jax.device_put(array, device)
