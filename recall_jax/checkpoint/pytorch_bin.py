"""Read PyTorch weight files (`pytorch_model.bin`) by torch, without running code in them."""

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from recall_jax.checkpoint.dtypes import DTYPE_OF_LONG_NAME
from recall_jax.checkpoint.names import check_name
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import InputError, reading, shown, storage_faults
from recall_jax.files.identity import FileIdentity, OpenedFile


class PytorchFile:
    """Read one .bin file: `specs` in the order of its mapping, `read(name)` for one tensor.

    `opened` is the state of the file when it was opened. It has no header: `header_hash` is None.
    """

    header_hash: None = None

    def __init__(self, path: Path) -> None:
        """Open through a memory map; InputError without torch, or if it is not plain tensors."""
        self.path = path
        with storage_faults(f"read {path}"):
            self.opened = OpenedFile(path, FileIdentity.of(path))
        stored = _stored_sizes(path)
        self._tensors = _load(path, mapped=stored is not None)
        for name in self._tensors:
            check_name(name, path)
        self.specs: Mapping[str, TensorSpec] = {
            name: _spec(tensor, self.opened.identity.size, f"{path}, tensor {shown(name)}")
            for name, tensor in self._tensors.items()
        }
        if stored is not None and _held_sizes(self._tensors.values()) != stored:
            raise InputError(f"{path} is damaged: its tensors do not match the bytes stored")

    def read(self, name: str) -> np.ndarray:
        """Return tensor `name`, C-contiguous and read-only; copied only if stored otherwise."""
        return _as_numpy(self._tensors[name], self.specs[name].dtype)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows `start` to `stop` of tensor `name` like `read`; a scalar is one row, (1,)."""
        tensor = self._tensors[name]
        rows = tensor if tensor.ndim else tensor.reshape(1)
        return _as_numpy(rows[start:stop], self.specs[name].dtype)

    def drop(self, name: str) -> None:
        """Do nothing: torch keeps the file mapped, and the system drops no mapped page."""


def _as_numpy(tensor: Any, dtype: np.dtype[Any]) -> np.ndarray:
    tensor = tensor.detach().resolve_neg().contiguous()
    if dtype == ml_dtypes.bfloat16:  # torch cannot convert it to numpy
        import torch

        tensor = tensor.view(torch.int16)
    array: np.ndarray = tensor.numpy().view(dtype)
    array.flags.writeable = False
    return array


def _load(path: Path, *, mapped: bool) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path} needs torch: pip install 'recall-jax[torch]', or convert it to safetensors"
        ) from error
    try:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
    except Exception as error:  # torch raises any exception for a damaged file
        raise InputError(
            f"{path} is damaged, or holds more than tensors and is not loaded for safety "
            f"({type(error).__name__}); convert it to safetensors if you trust it"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in content.items()
    ):
        raise InputError(f"{path} is not a plain mapping of names to tensors")
    return dict(content)


def _stored_sizes(path: Path) -> list[int] | None:
    """Return the sizes of the non-empty storages in a file that can be mapped, ascending.

    Returns None for a file that torch must read: in the format before zip files, or compressed,
    which torch would wrongly map. Verifies the checksum of the other members, which torch does not.
    """
    with reading(str(path)):  # is_zipfile may fail too
        if not zipfile.is_zipfile(path):
            return None
    with reading(str(path)), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        storages = [member for member in members if "/data/" in member.filename]
        for member in members:
            if member not in storages:
                archive.read(member)
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            return None
        return sorted(filter(None, (member.file_size for member in storages)))


def _held_sizes(tensors: Iterable[Any]) -> list[int]:
    """Return the sizes of the distinct storages behind tensors, as `_stored_sizes` does."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sorted(filter(None, sizes.values()))


def _spec(tensor: Any, file_bytes: int, where: str) -> TensorSpec:
    name = str(tensor.dtype).removeprefix("torch.")
    dtype = DTYPE_OF_LONG_NAME.get(name)
    if dtype is None or str(tensor.layout) != "torch.strided" or tensor.is_quantized:
        advice = "; dequantise it first" if tensor.is_quantized or "float8" in name else ""
        raise InputError(f"{where}: {tensor.dtype} ({tensor.layout}) is not supported{advice}")
    if tensor.device.type != "cpu":
        raise InputError(f"{where}: holds no data (device {tensor.device})")
    spec = TensorSpec(dtype, tuple(tensor.shape))
    if spec.nbytes > file_bytes:  # an expanded tensor repeats the same bytes
        raise InputError(
            f"{where}: its shape {list(spec.shape)} stands for {spec.nbytes} bytes, in a file of "
            f"{file_bytes}: save it contiguous"
        )
    return spec
