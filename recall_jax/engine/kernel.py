"""Define kernels: functions that merge one tensor of K models."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Protocol

import jax
from jax.typing import DTypeLike

# Values for one tensor: arrays (K,) by model, () by recipe, and whatever else its rule gives.
Values = Mapping[str, Any]


class Kernel(Protocol):
    """Merge one tensor of K models in float32, and round once."""

    def __call__(
        self,
        models: Sequence[jax.Array],
        values: Values,
        *,
        base: jax.Array | None,
        reference: int,
        dtype: DTypeLike,
    ) -> jax.Array:
        """Merge K arrays of one shape, and the base's if there is one, into one array of `dtype`.

        Where all models agree, the elements of model `reference` are passed on unchanged.
        """


@cache
def fixed(kernel: Callable[..., jax.Array], **options: Any) -> Kernel:
    """Return the kernel with fixed options: one object for equal options, as jit's cache needs."""
    return partial(kernel, **options)
