"""An adapter on its base, folded into one tensor at a time."""

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
    """An adapter on its base: which tensors it changes, what they are afterwards, and how.

    `specs` and `config` are the folded checkpoint's, in the dtypes of the base: a vocabulary may
    have grown, and an output head that parts from the embedding it was tied to is a tensor of its
    own. `edits` gives, for each tensor that is touched, the steps to it in their order; `origins`
    the tensor that one which the base lacks begins as.
    """

    file: SafetensorsFile
    specs: Mapping[str, TensorSpec]
    config: dict[str, Any]
    edits: Mapping[str, Sequence[Edit]]
    origins: Mapping[str, str]
    bytes_read: int = 0

    def touches(self, name: str) -> bool:
        """Whether folding changes the tensor `name`, or adds it."""
        return name in self.edits or name in self.origins

    def source(self, name: str) -> str | None:
        """The base's tensor that a touched `name` begins as; None if the adapter has it whole."""
        if isinstance(next(iter(self.edits.get(name, ())), None), Replace):
            return None
        return self.origins.get(name, name)

    def fold(self, name: str, array: np.ndarray | None) -> np.ndarray:
        """The folded tensor of a touched `name`, from the `array` of its source, None without one.

        In the dtype that it is computed in, `folded_dtype` of that in `specs`. InputError if it is
        not finite though the `array` is; what the base has of that is found where it is merged.
        """
        wide = folded_dtype(self.specs[name].dtype)

        asked: list[str] = []

        def read(key: str) -> np.ndarray:
            asked.append(key)
            self.bytes_read += self.file.specs[key].nbytes
            return self.file.read(key).astype(wide, copy=False)

        tensor = np.empty(0, wide) if array is None else array.astype(wide, copy=False)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            for edit in self.edits.get(name, ()):
                tensor = edit(tensor, read)
        if not np.isfinite(tensor).all() and (array is None or np.isfinite(array).all()):
            keys = [key for key in asked if not np.isfinite(self.file.read(key)).all()]
            why = f"its sum overflows {wide.name}, or DoRA divides by the norm of a zero output"
            if keys:
                why = f"{keys[0]} holds NaN or infinite values"
            raise InputError(
                f"{self.file.path}: tensor {name} is not finite with this adapter folded in, as "
                f"{why}: repair the adapter, or leave it out"
            )
        return tensor


def folded_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of a folded tensor that its base stores in `dtype`: float32, or float64 of one."""
    return np.promote_types(dtype, np.float32)
