"""Read and write trees in .npz files, each leaf an array under its path, as in big_vision.

numpy stores dtypes that it does not know as raw bytes: two-byte raw values are read as bfloat16.
"""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from recall_jax.checkpoint.names import check_leaves
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import InputError, reading, shown, storage_faults

NPZ_NAME = "tree.npz"  # within a folder that we write
_BFLOAT16, _RAW = np.dtype(ml_dtypes.bfloat16), np.dtype("V2")
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_SUFFIX = ".npy"
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # numpy's
_MOST_DEFLATED = 1032  # the highest compression ratio of deflate
_END_BYTES, _IN_ZIP64 = 22, 0xFFFF  # size of the last record; its count if zip64 has the true one


class NpzTree:
    """Read the leaves of a .npz file one at a time, without running any code in it."""

    def __init__(self, name: str, path: Path) -> None:
        """Read the headers; `name` is the user's. InputError if damaged, or not all are numbers."""
        self.name, self.path, self.bytes_read = name, path, 0
        with reading(str(path)), zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) != _counted(path, archive):
                raise ValueError("its directory is damaged")
            if others := [e.filename for e in entries if not e.filename.endswith(_SUFFIX)]:
                raise InputError(
                    f"{path} holds {shown(others[0])}, which is no array: leave it out"
                )
            names = [entry.filename.removesuffix(_SUFFIX) for entry in entries]
            check_leaves(names, path)
            self.specs = {
                name: self._spec(archive, entry, name)
                for name, entry in zip(names, entries, strict=True)
            }
        if not self.specs:
            raise InputError(f"{path} holds no arrays: save it with numpy.savez")

    def read(self, name: str) -> np.ndarray:
        """Read one leaf, C-contiguous; KeyError if unknown, InputError if its bytes are damaged."""
        spec = self.specs[name]
        with (
            reading(f"{name} of {self.path}"),
            zipfile.ZipFile(self.path) as archive,
            archive.open(name + _SUFFIX) as file,
        ):
            array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):  # at the end of the member, zipfile compares the checksum
                raise ValueError("more bytes than its shape has")
        self.bytes_read += spec.nbytes
        return np.asarray(array, order="C").view(spec.dtype)

    def _spec(self, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> TensorSpec:
        """Return the spec in a leaf's header, checked against its size in the file."""
        with reading(f"{name} of {self.path}"), archive.open(entry) as file:
            version = np.lib.format.read_magic(file)
            if version not in _HEADERS:
                raise ValueError(f"version {version} of numpy's format")
            shape, _, dtype = _HEADERS[version](file)
            header = file.tell()
        if dtype.hasobject or (dtype.kind == "V" and dtype != _RAW):
            raise InputError(
                f"{self.path}: {name} holds {shown(str(dtype))}, which is no number: save "
                "only numbers"
            )
        spec = TensorSpec(_BFLOAT16 if dtype == _RAW else dtype, shape)
        if (
            any(size < 0 for size in shape)
            or header + spec.nbytes != entry.file_size
            or entry.compress_type not in _COMPRESSIONS
            or entry.file_size > _MOST_DEFLATED * entry.compress_size
        ):
            raise InputError(
                f"{self.path}: {name} does not hold what its shape {shown(shape)} says: save it "
                "again"
            )
        return spec


def _counted(path: Path, archive: zipfile.ZipFile) -> int:
    """Return the number of members by the end record, which zipfile does not compare."""
    with path.open("rb") as file:
        file.seek(-_END_BYTES - len(archive.comment), os.SEEK_END)
        count = int.from_bytes(file.read(_END_BYTES)[10:12], "little")
    return len(archive.infolist()) if count == _IN_ZIP64 else count


def write_npz(path: Path, leaves: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write leaves as they come, uncompressed; the same leaves give the same bytes."""
    with storage_faults(f"write {path}"), zipfile.ZipFile(path, "w") as archive:
        for name, array in leaves:
            entry = zipfile.ZipInfo(name + _SUFFIX)  # has a constant date
            with archive.open(entry, "w", force_zip64=True) as file:
                _write_array(file, array)


def _write_array(file: Any, array: np.ndarray) -> None:
    raw = array.view(_RAW) if array.dtype == _BFLOAT16 else array
    np.lib.format.write_array(file, np.asarray(raw, order="C"), allow_pickle=False)
