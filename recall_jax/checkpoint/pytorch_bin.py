"""PyTorch weight files (`pytorch_model.bin`), read by torch without running what is in them."""

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
    """One .bin file: `specs` in the order of its mapping, `read(name)` for one tensor.

    `opened` is the file as it was then. It has no header: `header_hash` is None.
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
            raise InputError(f"{path} is damaged: its tensors are not what it has bytes for")

    def read(self, name: str) -> np.ndarray:
        """Tensor `name`, C-contiguous and read-only; a copy only if it is stored otherwise."""
        return _as_numpy(self._tensors[name], self.specs[name].dtype)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """As `read`, rows `start` to `stop` of tensor `name` alone; a scalar is one row, (1,)."""
        tensor = self._tensors[name]
        rows = tensor if tensor.ndim else tensor.reshape(1)
        return _as_numpy(rows[start:stop], self.specs[name].dtype)

    def drop(self, name: str) -> None:
        """Nothing: torch keeps the whole file mapped, and the system drops no mapped page."""


def _as_numpy(tensor: Any, dtype: np.dtype[Any]) -> np.ndarray:
    tensor = tensor.detach().resolve_neg().contiguous()
    if dtype == ml_dtypes.bfloat16:  # which torch does not give to numpy
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
    except Exception as error:  # torch raises what it likes on a file that is not as it should be
        raise InputError(
            f"{path} is damaged, or holds more than tensors and is not loaded for safety "
            f"({type(error).__name__}); convert it to safetensors where you trust it"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in content.items()
    ):
        raise InputError(f"{path} is not a plain mapping of names to tensors")
    return dict(content)


def _stored_sizes(path: Path) -> list[int] | None:
    """Bytes of the storages in a file that can be mapped, ascending, those of none left out.

    None for one that torch must read: in the format before zip files, or compressed, which torch
    would map as it is. What is no storage is held to its checksum here, as torch does not.
    """
    with reading(str(path)):  # to tell whether it is a zip file may fail too
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
    """Bytes of the storages that tensors are views of, each once, as `_stored_sizes` has them."""
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
    if spec.nbytes > file_bytes:  # an expanded tensor shows the same bytes again and again
        raise InputError(
            f"{where}: its shape {list(spec.shape)} stands for {spec.nbytes} bytes, in a file of "
            f"{file_bytes}: save it contiguous"
        )
    return spec
