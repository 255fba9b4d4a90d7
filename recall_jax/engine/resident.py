"""A model that is read once for two walks: the selection of typical samples, then the merge."""

from collections.abc import Callable, Mapping

import numpy as np

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.checkpoint.tensors import TensorSpec


class ResidentTensors:
    """Keeps the tensors it reads until `release`; from then on hands each out once more.

    What is kept of plain tensors is their map, whose pages stay in memory while there is room.
    """

    def __init__(self, model: Checkpoint) -> None:
        """Nothing is read yet."""
        self.name = model.name
        self.specs: Mapping[str, TensorSpec] = model.specs
        self._model = model
        self._kept: dict[tuple[str, int, int | None], np.ndarray] = {}
        self._keeping = True

    @property
    def bytes_read(self) -> int:
        """As of the model itself."""
        return self._model.bytes_read

    def read(self, name: str) -> np.ndarray:
        """Tensor `name`, from disk the first time."""
        return self._once((name, 0, None), lambda: self._model.read(name))

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of tensor `name`, from disk the first time that these are asked for."""
        return self._once((name, start, stop), lambda: self._model.read_rows(name, start, stop))

    def _once(
        self, asked: tuple[str, int, int | None], read: Callable[[], np.ndarray]
    ) -> np.ndarray:
        array = self._kept[asked] if asked in self._kept else read()
        if self._keeping:
            self._kept[asked] = array
        else:
            self._kept.pop(asked, None)
        return array

    def drop(self, name: str) -> None:
        """Let the system forget it, as of the model itself."""
        self._model.drop(name)

    def release(self) -> None:
        """End the first walk."""
        self._keeping = False
