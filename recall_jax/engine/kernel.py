"""Kernels: the functions that merge one tensor of K models."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Protocol

import jax
from jax.typing import DTypeLike

# For one tensor: arrays (K,) of the models, () of the recipe, and what else its rule gives.
Values = Mapping[str, Any]


class Kernel(Protocol):
    """Merges a tensor, in float32, and rounds once."""

    def __call__(
        self,
        models: Sequence[jax.Array],
        values: Values,
        *,
        base: jax.Array | None,
        reference: int,
        dtype: DTypeLike,
    ) -> jax.Array:
        """Merge K arrays of one shape, and the base's, into one of `dtype`.

        Where all models agree, the elements of the model `reference` pass unchanged.
        """


@cache
def fixed(kernel: Callable[..., jax.Array], **options: Any) -> Kernel:
    """Return the kernel with its options fixed: for equal options the same object, as jit wants."""
    return partial(kernel, **options)
