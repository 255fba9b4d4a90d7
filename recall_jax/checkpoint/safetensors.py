"""Read safetensors files through a memory map, without the safetensors package.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes:
https://github.com/huggingface/safetensors#format. Opening a file validates the complete header, so
that no tensor can reach beyond the file.
"""

import ctypes
import errno
import hashlib
import math
import mmap
import os
import sys
import weakref
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from recall_jax.checkpoint.dtypes import DTYPE_OF_NAME
from recall_jax.checkpoint.names import check_name
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import InputError, StorageError, shown, storage_faults
from recall_jax.files.identity import FileIdentity, OpenedFile
from recall_jax.files.json_objects import MAX_BYTES, parse_json_object

MAX_HEADER_BYTES = MAX_BYTES  # also the limit of the safetensors package
_LENGTH_BYTES = 8
_MAX_DIMENSIONS = 64  # numpy's
_POPULATE_READ = 22  # MADV_POPULATE_READ (Linux 5.14), missing in Python's mmap
# Systems whose off_t in sys/mman.h is known to have 64 bits.
_MAPS_BY_CTYPES = sys.platform in ("linux", "darwin") and sys.maxsize > 2**32
_MAP_FAILED = ctypes.c_void_p(-1).value


class SafetensorsFile:
    """Read one safetensors file: `specs` in byte order, `read(name)` for one tensor.

    `opened` is the state of the file when it was opened, `header_hash` the hex sha256 of its
    header.
    """

    def __init__(self, path: Path) -> None:
        """Open and validate the file; InputError names the file and the tensor at fault."""
        self.path = path
        with storage_faults(f"read {path}"), path.open("rb") as file:
            self.opened = OpenedFile(path, FileIdentity.of(file.fileno()))
            text = _read_header(file, self.opened.identity.size, path)
        self.header_hash = hashlib.sha256(text).hexdigest()
        data_start = _LENGTH_BYTES + len(text)
        header = parse_json_object(text, f"the header of {path}")
        self.specs: Mapping[str, TensorSpec]
        self.specs, offsets = _layout(header, self.opened.identity.size - data_start, path)
        self._starts = {name: data_start + begin for name, begin in offsets.items()}

    def read(self, name: str) -> np.ndarray:
        """Return a read-only view of tensor `name`, mapped for as long as the array lives.

        Each tensor has a separate map, so its pages leave the process with the array; no file stays
        open. On Linux 5.14 or later its bytes are loaded before this returns: this thread waits for
        the disk, and a read error is a StorageError here, not a SIGBUS where the array is used.
        Bytes not aligned for their dtype are copied. Raises InputError if the file has changed
        since it was opened.
        """
        return self._view(self.specs[name], self._starts[name])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows `start` to `stop` of tensor `name` like `read`; a scalar is one row, (1,)."""
        spec = self.specs[name]
        rows, *rest = spec.shape or (1,)
        part = TensorSpec(spec.dtype, (len(range(rows)[start:stop]), *rest))
        return self._view(part, self._starts[name] + start * spec.nbytes // max(rows, 1))

    def _view(self, spec: TensorSpec, start: int) -> np.ndarray:
        """Map a tensor that begins at byte `start` of the file."""
        if spec.nbytes == 0:
            return np.empty(spec.shape, spec.dtype)
        page = start - start % mmap.ALLOCATIONGRANULARITY
        with storage_faults(f"read {self.path}"), self.path.open("rb") as file:
            self._refuse_changed(file)
            length = start - page + spec.nbytes
            mapped = _map(file.fileno(), page, length)
            fault = _populate(mapped)
            self._refuse_changed(file)  # the most likely reason for missing bytes
            if fault:
                raise StorageError(f"cannot read {self.path}: {os.strerror(fault)}")
        view: np.ndarray = np.ndarray(spec.shape, spec.dtype, mapped, start - page)
        return view if view.flags.aligned else view.copy()

    def drop(self, name: str) -> None:
        """Tell the system that it need not cache the bytes of tensor `name`.

        Pages that an array still maps stay.
        """
        start, nbytes = self._starts[name], self.specs[name].nbytes
        # a length of 0 would mean all the rest of the file
        if nbytes and hasattr(os, "posix_fadvise"):
            with suppress(OSError), self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), start, nbytes, os.POSIX_FADV_DONTNEED)

    def _refuse_changed(self, file: BinaryIO) -> None:
        if not self.opened.is_unchanged(FileIdentity.of(file.fileno())):
            raise InputError(
                f"{self.path} was changed while it was being read: start again when nothing "
                "writes to it"
            )


class _Pages:
    """Expose mapped memory to numpy as read-only bytes at an address."""

    def __init__(self, address: int, length: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (length,),
            "data": (address, True),
        }


def _map(descriptor: int, start: int, length: int) -> np.ndarray:
    """Map bytes of a file as an array (length,); they are unmapped with the last array on them.

    Python's mmap keeps the file open, which is too many files for thousands of tensors: a process
    may have 256 open files on macOS, 1024 on most Linux systems. The system needs no open file.
    """
    if not _MAPS_BY_CTYPES:
        kept = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=start)
        return np.frombuffer(kept, np.uint8)
    library = _libc()
    address = library.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
    if address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    pages = _Pages(address, length)
    unmap = weakref.finalize(pages, library.munmap, address, length)
    unmap.atexit = False  # at exit other threads may still use them
    return np.asarray(pages)


def _populate(mapped: np.ndarray) -> int:
    """Load every page of a map now; return 0, or the errno of a failed read.

    Uses ctypes, because mmap.madvise would hold the interpreter's lock while it waits for the disk.
    """
    if sys.platform != "linux":
        return 0
    madvise, address, length = _libc().madvise, mapped.ctypes.data, mapped.size
    madvise(address, length, mmap.MADV_WILLNEED)  # read ahead everything, not window by window
    if madvise(address, length, _POPULATE_READ) == 0:
        return 0
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):  # an older kernel loads pages on first use
        return 0
    return errno.EIO if code == errno.EFAULT else code  # an access would raise SIGBUS


@cache
def _libc() -> ctypes.CDLL:
    """Return the system's C library with the signatures of sys/mman.h."""
    library, size = ctypes.CDLL(None, use_errno=True), ctypes.c_size_t
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, size, *[ctypes.c_int] * 3, ctypes.c_int64]
    library.munmap.argtypes = [ctypes.c_void_p, size]
    library.madvise.argtypes = [ctypes.c_void_p, size, ctypes.c_int]
    return library


def _read_header(file: BinaryIO, file_bytes: int, path: Path) -> bytes:
    """Return the text of the header; the tensors' bytes follow it."""
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
    return file.read(length)


def _layout(
    header: dict[str, Any], data_bytes: int, path: Path
) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    """Return specs and start offsets by tensor name; the tensors must tile the data exactly."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"the header of {path}: __metadata__ must map strings to strings")
    for name in header:
        check_name(name, path)
    entries = [
        (*_entry(value, f"{path}, tensor {shown(name)}"), name) for name, value in header.items()
    ]
    entries.sort(key=lambda entry: entry[:2])
    position = 0
    for begin, end, _, name in entries:
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a hole"
            raise InputError(
                f"{path}, tensor {shown(name)}: starts at {begin}, {fault} at {position}"
            )
        position = end
    if position != data_bytes:
        fault = "truncated" if position > data_bytes else "followed by bytes of no tensor"
        raise InputError(f"{path} is {fault}: tensors end at {position}, data at {data_bytes}")
    specs = {name: spec for _, _, spec, name in entries}
    return specs, {name: begin for begin, _, _, name in entries}


def _entry(value: Any, where: str) -> tuple[int, int, TensorSpec]:
    """Return begin, end and spec of a header entry, checked against each other."""
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
    # numpy multiplies the sizes of an empty array too
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
    """Return `value` as a tuple if it is a list of non-negative integers, else None."""
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    return None
