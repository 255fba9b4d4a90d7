"""Fold an adapter that is matched with its base into one tensor at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recall_jax.checkpoint.lora_edits import Edit, Replace
from recall_jax.checkpoint.safetensors import SafetensorsFile
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import InputError


@dataclass
class BoundAdapter:
    """Hold which tensors of the base an adapter changes, what they become, and how.

    `specs` and `config` are the folded checkpoint's, in the dtypes of the base: a vocabulary may
    have grown, and an output head may be separated from its embedding. `edits` maps each changed
    tensor to its steps in order; `origins` maps a tensor that the base lacks to the one it starts
    as.
    """

    file: SafetensorsFile
    specs: Mapping[str, TensorSpec]
    config: dict[str, Any]
    edits: Mapping[str, Sequence[Edit]]
    origins: Mapping[str, str]
    bytes_read: int = 0

    def touches(self, name: str) -> bool:
        """Return whether folding changes the tensor `name`, or adds it."""
        return name in self.edits or name in self.origins

    def source(self, name: str) -> str | None:
        """Return the base tensor that `name` starts as; None if the adapter holds all of it."""
        if isinstance(next(iter(self.edits.get(name, ())), None), Replace):
            return None
        return self.origins.get(name, name)

    def fold(self, name: str, array: np.ndarray | None) -> np.ndarray:
        """Fold the adapter into the changed tensor `name`, given the `array` of its source, if any.

        The result has the dtype of the computation, `folded_dtype` of that in `specs`. Raises
        InputError if it is not finite although `array` is; values of the base that are not finite
        are reported where they are merged.
        """
        wide = folded_dtype(self.specs[name].dtype)

        keys_read: list[str] = []

        def read(key: str) -> np.ndarray:
            keys_read.append(key)
            self.bytes_read += self.file.specs[key].nbytes
            return self.file.read(key).astype(wide, copy=False)

        tensor = np.empty(0, wide) if array is None else array.astype(wide, copy=False)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            for edit in self.edits.get(name, ()):
                tensor = edit(tensor, read)
        if not np.isfinite(tensor).all() and (array is None or np.isfinite(array).all()):
            keys = [key for key in keys_read if not np.isfinite(self.file.read(key)).all()]
            why = f"its sum overflows {wide.name}, or DoRA divides by the norm of a zero output"
            if keys:
                why = f"{keys[0]} holds NaN or infinite values"
            raise InputError(
                f"{self.file.path}: tensor {name} is not finite with this adapter folded in, as "
                f"{why}: repair the adapter, or leave it out"
            )
        return tensor


def folded_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of a folded tensor: float64 for a float64 base, else float32."""
    return np.promote_types(dtype, np.float32)
