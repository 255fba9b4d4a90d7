"""Compute the size and checksum of files while they are written, or by reading them back."""

import ctypes
import errno
import os
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from isal import isal_zlib  # zlib's CRC-32, at ten times its speed

from recall_jax.errors import storage_faults

_BLOCK = 1 << 18  # small enough to stay in the processor's cache
_WRITEBACK = 1 << 26  # flush this often, so that not everything waits for the last sync

# linux/falloc.h and linux/fs.h
_FALLOC_FL_KEEP_SIZE, _SYNC_FILE_RANGE_WRITE = 1, 2


class FileChecksum(TypedDict):
    """Hold the size and CRC-32 (8 hex digits) of one file."""

    bytes: int
    crc32: str


class ChecksummedFile:
    """Append to a file and update its size and checksum with every write.

    Writes are neither buffered nor synced: whoever publishes the file syncs it.
    """

    def __init__(self, path: Path, final_size: int = 0, part: FileChecksum | None = None) -> None:
        """Create the file, or continue one whose first `part` is already written."""
        self.path = path
        self.size, self.crc = (part["bytes"], int(part["crc32"], 16)) if part else (0, 0)
        self._started = self.size  # bytes whose writeback has begun
        with storage_faults(f"write {path}"):
            self._file = path.open("r+b" if part else "wb", buffering=0)
            self._file.truncate(self.size)
            self._file.seek(self.size)
            if final_size > self.size:
                self._reserve(final_size)

    def _reserve(self, final_size: int) -> None:
        """Reserve the disk space, so that a full disk is reported before the work begins."""
        rest = (ctypes.c_int64(self.size), ctypes.c_int64(final_size - self.size))
        code = _linux("fallocate", self._file.fileno(), _FALLOC_FL_KEEP_SIZE, *rest)
        if code in {errno.ENOSPC, errno.EDQUOT}:  # any other code: not supported here
            self._file.truncate(self.size)  # give back what was reserved
            self._file.close()
            raise OSError(code, os.strerror(code))

    def write(self, data: bytes | memoryview) -> None:
        """Append `data` without copying it."""
        rest = memoryview(data)
        with storage_faults(f"write {self.path}"):
            while rest:  # the system takes at most 2 GiB at once
                rest = rest[self._file.write(rest) :]
        self.size += len(data)
        self.crc = isal_zlib.crc32(data, self.crc)
        if (grown := self.size - self._started) >= _WRITEBACK:
            # start the writeback without waiting; elsewhere the final sync does all of it
            span = (ctypes.c_int64(self._started), ctypes.c_int64(grown))
            _linux("sync_file_range", self._file.fileno(), *span, _SYNC_FILE_RANGE_WRITE)
            self._started = self.size

    def close(self) -> FileChecksum:
        """Close the file and return its size and checksum."""
        with storage_faults(f"write {self.path}"):
            self._file.close()
        return checksum_of(self.size, self.crc)


def checksum_of(size: int, crc: int) -> FileChecksum:
    """Return a FileChecksum from a size and a CRC-32."""
    return {"bytes": size, "crc32": f"{crc:08x}"}


def checksum_fault(name: str, entry: Any) -> str | None:
    """Return what is wrong with an entry of `checksums.json`, or None."""
    # Only the name is checked: the links of the hub's cache may lead out of the folder.
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        return "is no file in the folder"
    size, crc = (entry.get("bytes"), entry.get("crc32")) if isinstance(entry, dict) else (0, 0)
    if type(size) is not int or not isinstance(crc, str):
        return "has no size and checksum"
    return None


def file_checksum(path: Path) -> FileChecksum:
    """Read a file and return its checksum.

    Raises InputError if it cannot be read, StorageError if the disk fails.
    """
    size = crc = 0
    block = memoryview(bytearray(_BLOCK))
    with storage_faults(f"read {path}"), path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            size, crc = size + count, isal_zlib.crc32(block[:count], crc)
    return checksum_of(size, crc)


def crc_between(path: Path, start: int, stop: int, crc: int) -> int:
    """Return the CRC-32 at position `stop`, where `crc` is that of the bytes before `start`.

    Raises OSError if the file ends before `stop`.
    """
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # so that the disk is read, not the page cache
            os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)
        file.seek(start)
        while start < stop:
            count = file.readinto(block[: stop - start])
            if not count:
                raise OSError(errno.ENODATA, f"{path} has less than {stop} bytes")
            start, crc = start + count, isal_zlib.crc32(block[:count], crc)
    return crc


def _linux(name: str, *arguments: object) -> int:
    """Call a function of Linux's C library; return 0, its errno, or ENOSYS on other systems."""
    try:
        call = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (AttributeError, OSError, TypeError):
        return errno.ENOSYS
    return 0 if call(*arguments) == 0 else ctypes.get_errno()
