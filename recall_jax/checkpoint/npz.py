"""Trees in .npz files, each leaf an array by its path, as big_vision keeps them.

numpy writes what it does not know, such as bfloat16, as raw bytes: two of them are a bfloat16.
"""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import InputError, storage_faults

NPZ_NAME = "tree.npz"  # in a folder of ours
_BFLOAT16, _RAW = np.dtype(ml_dtypes.bfloat16), np.dtype("V2")
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_SUFFIX = ".npy"


class NpzTree:
    """The leaves of a .npz file, read one at a time; nothing in it is run."""

    def __init__(self, name: str, path: Path) -> None:
        """Read what leaves there are; `name` is the user's. InputError if damaged, or objects."""
        self.name, self.path, self.bytes_read = name, path, 0
        with self._damage(), storage_faults(f"read {path}"), zipfile.ZipFile(path) as archive:
            entries = [each for each in archive.namelist() if each.endswith(_SUFFIX)]
            self.specs = {
                entry.removesuffix(_SUFFIX): self._spec(archive, entry) for entry in entries
            }
        if not self.specs:
            raise InputError(f"{path} holds no arrays: save it with numpy.savez")

    def read(self, name: str) -> np.ndarray:
        """One leaf, C-contiguous; KeyError if unknown."""
        spec = self.specs[name]
        with (
            self._damage(),
            storage_faults(f"read {self.path}"),
            zipfile.ZipFile(self.path) as archive,
            archive.open(name + _SUFFIX) as file,
        ):
            array = np.lib.format.read_array(file, allow_pickle=False)
        self.bytes_read += spec.nbytes
        return np.asarray(array, order="C").view(spec.dtype)

    def _spec(self, archive: zipfile.ZipFile, entry: str) -> TensorSpec:
        with archive.open(entry) as file:
            version = np.lib.format.read_magic(file)
            if version not in _HEADERS:
                raise ValueError(f"version {version} of numpy's format")
            shape, _, dtype = _HEADERS[version](file)
        if dtype.hasobject or (dtype.kind == "V" and dtype != _RAW):
            raise InputError(
                f"{self.path}: {entry.removesuffix(_SUFFIX)} holds {dtype}, which is no number: "
                "save the parameters alone"
            )
        return TensorSpec(_BFLOAT16 if dtype == _RAW else dtype, shape)

    @contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self.path} is no whole .npz file ({reason}): save it again"
            ) from error


def write_npz(path: Path, leaves: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write leaves as they come, uncompressed; the same leaves give the same bytes."""
    with storage_faults(f"write {path}"), zipfile.ZipFile(path, "w") as archive:
        for name, array in leaves:
            entry = zipfile.ZipInfo(name + _SUFFIX)  # without the time of day
            with archive.open(entry, "w", force_zip64=True) as file:
                _write_array(file, array)


def _write_array(file: Any, array: np.ndarray) -> None:
    raw = array.view(_RAW) if array.dtype == _BFLOAT16 else array
    np.lib.format.write_array(file, np.asarray(raw, order="C"), allow_pickle=False)
