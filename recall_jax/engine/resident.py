"""Keep a model in memory for a second walk: it selects the typical samples, and is then merged."""

from collections.abc import Callable, Mapping

import numpy as np

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.checkpoint.tensors import TensorSpec


class ResidentTensors:
    """Keep the tensors that are read until `release`, and from then on return each once more.

    For plain tensors the memory map is kept, whose pages stay cached as long as there is room.
    """

    def __init__(self, model: Checkpoint) -> None:
        """Wrap a model, without reading anything."""
        self.name = model.name
        self.specs: Mapping[str, TensorSpec] = model.specs
        self._model = model
        self._kept: dict[tuple[str, int, int | None], np.ndarray] = {}
        self._keeping = True

    @property
    def bytes_read(self) -> int:
        """Return the bytes read from the model so far."""
        return self._model.bytes_read

    def read(self, name: str) -> np.ndarray:
        """Return tensor `name`, read from disk the first time."""
        return self._once((name, 0, None), lambda: self._model.read(name))

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of tensor `name`, read from disk the first time."""
        return self._once((name, start, stop), lambda: self._model.read_rows(name, start, stop))

    def _once(self, key: tuple[str, int, int | None], read: Callable[[], np.ndarray]) -> np.ndarray:
        array = self._kept[key] if key in self._kept else read()
        if self._keeping:
            self._kept[key] = array
        else:
            self._kept.pop(key, None)
        return array

    def drop(self, name: str) -> None:
        """Drop the tensor's pages from the system's cache, as the model does."""
        self._model.drop(name)

    def release(self) -> None:
        """End the first walk."""
        self._keeping = False
