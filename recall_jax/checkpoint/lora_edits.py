"""Compute an adapter's changes: each step from a base tensor to the folded one.

A step takes the tensor, float32 (float64 for a float64 base), and a function that reads tensors of
the adapter in the same dtype. It must not modify either.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from recall_jax.errors import InputError

Read = Callable[[str], np.ndarray]
Edit = Callable[[np.ndarray, Read], np.ndarray]


@dataclass(frozen=True)
class Replace:
    """Replace a tensor by the adapter's full copy, which tied weights store under several keys."""

    keys: tuple[str, ...]

    def __call__(self, tensor: np.ndarray, read: Read) -> np.ndarray:
        """Return the adapter's tensor; InputError if its copies differ."""
        first, *others = map(read, self.keys)
        if any(not np.array_equal(first, other) for other in others):
            raise InputError(f"{' and '.join(self.keys)} are one tied weight, but differ")
        return first


@dataclass(frozen=True)
class ReplaceRows:
    """Replace rows of an embedding (V, E) by trained ones, which are (len(rows), E)."""

    key: str
    rows: tuple[int, ...]

    def __call__(self, tensor: np.ndarray, read: Read) -> np.ndarray:
        """Return the embedding with the trained rows in place."""
        tensor = tensor.copy()
        tensor[list(self.rows)] = read(self.key)
        return tensor


@dataclass(frozen=True)
class EqualUpdates:
    """Check that the updates of the two uses of a tied weight agree.

    `pairs` are the keys of one update and the other, which is stored `transposed` or not.
    """

    pairs: tuple[tuple[str, str], ...]
    transposed: bool

    def __call__(self, tensor: np.ndarray, read: Read) -> np.ndarray:
        """Return the tensor unchanged; InputError if the two updates differ."""
        for one, other in self.pairs:
            again = read(other)
            if not np.array_equal(read(one), again.T if self.transposed else again):
                raise InputError(f"{one} and {other} are of one tied weight, but differ")
        return tensor


@dataclass(frozen=True)
class AddBias:
    """Add the bias of lora_B (out,), scaled as B A is."""

    key: str
    scale: float

    def __call__(self, tensor: np.ndarray, read: Read) -> np.ndarray:
        """Return b + scale * bias."""
        return tensor + read(self.key) * self.scale


@dataclass(frozen=True)
class LowRank:
    """Compute W + scale B A, A (r, in), B (out, r), W (out, in) or, if `transposed`, (in, out).

    With a `magnitude` m (out,), DoRA (arXiv:2402.09353, eq. 5): m (W + scale B A) over the norm of
    W + scale B A, taken along the inputs of each output. An embedding (V, E) is a transposed layer
    with in = V, out = E.
    """

    a: str
    b: str
    magnitude: str | None
    scale: float
    transposed: bool

    def __call__(self, tensor: np.ndarray, read: Read) -> np.ndarray:
        """Return the updated weight; not finite where DoRA divides by the norm of a zero output."""
        a, b = read(self.a), read(self.b)
        folded = a.T @ b.T if self.transposed else b @ a
        folded *= self.scale
        folded += tensor
        if self.magnitude is not None:
            inputs = 0 if self.transposed else 1
            norm = np.sqrt(np.sum(np.square(folded), axis=inputs, dtype=np.float64))
            factor = (read(self.magnitude) / norm).astype(folded.dtype)
            folded *= np.expand_dims(factor, inputs)
        return folded
