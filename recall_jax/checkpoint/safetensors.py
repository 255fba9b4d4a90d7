"""Safetensors files, read through the operating system's memory map without any other package.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes:
https://github.com/huggingface/safetensors#format. The header is validated whole when the file is
opened, so that reading a tensor afterwards cannot leave it.
"""

import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shown  # values from a hostile header may be long
from typing import Any, BinaryIO

import numpy as np

from recall_jax.checkpoint.json_objects import parse_json_object
from recall_jax.checkpoint.tensors import DTYPE_OF_NAME, TensorSpec
from recall_jax.errors import InputError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
_LENGTH_BYTES = 8
_MAX_DIMENSIONS = 64  # numpy's


class SafetensorsFile:
    """One safetensors file: `specs` in the order of the bytes, `read(name)` for one tensor."""

    def __init__(self, path: Path) -> None:
        """Open and validate; InputError names the file and the tensor at fault."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._identity = _identity(file)
                header, data_start = _read_header(file, path)
                data_bytes = os.fstat(file.fileno()).st_size - data_start
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        self.specs: Mapping[str, TensorSpec]
        self.specs, offsets = _layout(header, data_bytes, path)
        self._starts = {name: data_start + begin for name, begin in offsets.items()}

    def read(self, name: str) -> np.ndarray:
        """A read-only view of tensor `name`, mapped for as long as the array lives.

        Each tensor has a map of its own, so its pages leave the process when the array does. Bytes
        that are not aligned for their dtype are copied.
        """
        spec, start = self.specs[name], self._starts[name]
        if spec.nbytes == 0:
            return np.empty(spec.shape, spec.dtype)
        page = start - start % mmap.ALLOCATIONGRANULARITY
        try:
            with self.path.open("rb") as file:
                if _identity(file) != self._identity:
                    raise InputError(f"{self.path} was changed while it was being read")
                length = start - page + spec.nbytes
                mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=page)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error
        view: np.ndarray = np.ndarray(spec.shape, spec.dtype, mapped, start - page)
        return view if view.flags.aligned else view.copy()


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The header and the file offset at which the tensors' bytes begin."""
    file_bytes = os.fstat(file.fileno()).st_size
    if file_bytes < _LENGTH_BYTES:
        raise InputError(f"{path} is truncated: {file_bytes} bytes are no safetensors file")
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{path}: its header claims {length} bytes, over {MAX_HEADER_BYTES}")
    if length > file_bytes - _LENGTH_BYTES:
        raise InputError(
            f"{path} is truncated: its header claims {length} bytes, "
            f"{file_bytes - _LENGTH_BYTES} follow"
        )
    return parse_json_object(file.read(length), f"the header of {path}"), _LENGTH_BYTES + length


def _layout(
    header: dict[str, Any], data_bytes: int, path: Path
) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    """Specs and start offsets by tensor name; the tensors must tile the data exactly."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"the header of {path}: __metadata__ must map strings to strings")
    entries = [(*_entry(value, f"{path}, tensor {name!r}"), name) for name, value in header.items()]
    entries.sort(key=lambda entry: entry[:2])
    position = 0
    for begin, end, _, name in entries:
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a hole"
            raise InputError(f"{path}, tensor {name!r}: starts at {begin}, {fault} at {position}")
        position = end
    if position != data_bytes:
        fault = "truncated" if position > data_bytes else "followed by bytes of no tensor"
        raise InputError(f"{path} is {fault}: tensors end at {position}, data at {data_bytes}")
    specs = {name: spec for _, _, spec, name in entries}
    return specs, {name: begin for begin, _, _, name in entries}


def _entry(value: Any, where: str) -> tuple[int, int, TensorSpec]:
    """Begin, end and spec of one header entry, each checked against the others."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: its header entry is not an object")
    dtype_name = value.get("dtype")
    dtype = DTYPE_OF_NAME.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        advice = "; dequantise it first" if str(dtype_name).startswith(("F8", "F6", "F4")) else ""
        raise InputError(f"{where}: dtype {shown(dtype_name)} is not supported{advice}")
    shape = _sizes(value.get("shape"))
    if shape is None or len(shape) > _MAX_DIMENSIONS:
        raise InputError(f"{where}: shape {shown(value.get('shape'))} is not a list of sizes")
    # an empty array too must have sizes that numpy can multiply
    if math.prod(size or 1 for size in shape) * dtype.itemsize >= 2**63:
        raise InputError(f"{where}: shape {shown(list(shape))} is too large")
    offsets = _sizes(value.get("data_offsets"))
    if offsets is None or len(offsets) != 2:
        raise InputError(
            f"{where}: data_offsets {shown(value.get('data_offsets'))} are no byte range"
        )
    spec = TensorSpec(dtype, shape)
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise InputError(
            f"{where}: {dtype_name} of shape {shown(list(shape))} takes {spec.nbytes} bytes, "
            f"data_offsets {shown(list(offsets))} give {end - begin}"
        )
    return begin, end, spec


def _sizes(value: Any) -> tuple[int, ...] | None:
    """`value` as a tuple if it is a list of non-negative integers."""
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    return None
