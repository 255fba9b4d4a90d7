"""A model that is read once for two walks: the selection of typical samples, then the merge."""

from collections.abc import Mapping

import numpy as np

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.checkpoint.tensors import TensorSpec


class Resident:
    """Keeps the tensors it reads until `release`; from then on hands each out once more.

    What is kept of plain tensors is their map, whose pages stay in memory while there is room.
    """

    def __init__(self, model: Checkpoint) -> None:
        """Nothing is read yet."""
        self.name = model.name
        self.specs: Mapping[str, TensorSpec] = model.specs
        self._model = model
        self._kept: dict[str, np.ndarray] = {}
        self._keeping = True

    @property
    def bytes_read(self) -> int:
        """As of the model itself."""
        return self._model.bytes_read

    def read(self, name: str) -> np.ndarray:
        """Tensor `name`, from disk the first time."""
        array = self._kept[name] if name in self._kept else self._model.read(name)
        if self._keeping:
            self._kept[name] = array
        else:
            self._kept.pop(name, None)
        return array

    def drop(self, name: str) -> None:
        """Let the system forget it, as of the model itself."""
        self._model.drop(name)

    def release(self) -> None:
        """End the first walk."""
        self._keeping = False
