"""Tensors of checkpoints on their way to the device."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_PIECE = 2**20  # elements looked at together, so that no tensor needs as much memory again


def not_finite(model: str, tensors: Mapping[str, Any]) -> str | None:
    """A line that names the first tensor with NaN or infinity, None if there is none."""
    for name, array in tensors.items():
        elements = np.asarray(array).reshape(-1)
        starts = range(0, elements.size, _PIECE)
        if not all(np.isfinite(elements[start : start + _PIECE]).all() for start in starts):
            return is_not_finite(model, name)
    return None


def is_not_finite(model: str, name: str) -> str:
    """The line on a tensor that was found to hold NaN or infinity."""
    return f"{model}: tensor {name} holds NaN or infinite values; repair this model"


def common_dtype(arrays: Sequence[Any]) -> np.dtype[Any]:
    """The narrowest dtype that has all numbers of these arrays: float32 of two kinds of 16 bits."""
    with jax.numpy_dtype_promotion("standard"):
        return reduce(jnp.promote_types, [array.dtype for array in arrays])


def to_device(array: np.ndarray, device: jax.Device) -> jax.Array:
    """A tensor of a checkpoint on a device; float64 becomes float32 there.

    On CPU a tensor that lies aligned in its file is used where it is mapped, without a copy.
    """
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):  # infinity, which the forward will find
            array = array.astype(np.float32)
    return jax.device_put(array, device)
