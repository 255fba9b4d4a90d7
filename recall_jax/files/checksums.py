"""Files that know their size and checksum: taken as the bytes pass, or by reading back."""

import ctypes
import errno
import os
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from isal import isal_zlib  # zlib's CRC-32, at ten times its speed

from recall_jax.errors import storage_faults

_BLOCK = 1 << 18  # read into the same memory again and again, which the processor then has at hand
_WRITEBACK = 1 << 26  # sent to the disk as it gathers, so that not all is left to the end

# linux/falloc.h and linux/fs.h
_FALLOC_FL_KEEP_SIZE, _SYNC_FILE_RANGE_WRITE = 1, 2


class FileChecksum(TypedDict):
    """Size and CRC-32 (8 hex digits) of one file."""

    bytes: int
    crc32: str


class ChecksummedFile:
    """A file that grows, its size and checksum kept as the bytes pass.

    Nothing is buffered here, and nothing waits for the disk: whoever publishes the file syncs it.
    """

    def __init__(self, path: Path, final_size: int = 0, part: FileChecksum | None = None) -> None:
        """A new file, or one to be continued after its first `part`."""
        self.path = path
        self.size, self.crc = (part["bytes"], int(part["crc32"], 16)) if part else (0, 0)
        self._started = self.size  # of the bytes, those whose way to the disk has begun
        with storage_faults(f"write {path}"):
            self._file = path.open("r+b" if part else "wb", buffering=0)
            self._file.truncate(self.size)
            self._file.seek(self.size)
            if final_size > self.size:
                self._reserve(final_size)

    def _reserve(self, final_size: int) -> None:
        """Claim the room, so that a full disk is told before the work."""
        rest = (ctypes.c_int64(self.size), ctypes.c_int64(final_size - self.size))
        code = _linux("fallocate", self._file.fileno(), _FALLOC_FL_KEEP_SIZE, *rest)
        if code in {errno.ENOSPC, errno.EDQUOT}:  # any other refusal: it cannot be claimed
            self._file.truncate(self.size)  # a claim met in part
            self._file.close()
            raise OSError(code, os.strerror(code))

    def write(self, data: bytes | memoryview) -> None:
        """Append; memory is not copied."""
        rest = memoryview(data)
        with storage_faults(f"write {self.path}"):
            while rest:  # the system takes at most 2 GiB at once
                rest = rest[self._file.write(rest) :]
        self.size += len(data)
        self.crc = isal_zlib.crc32(data, self.crc)
        if (grown := self.size - self._started) >= _WRITEBACK:
            # without waiting; a system that cannot leaves it to the end
            span = (ctypes.c_int64(self._started), ctypes.c_int64(grown))
            _linux("sync_file_range", self._file.fileno(), *span, _SYNC_FILE_RANGE_WRITE)
            self._started = self.size

    def close(self) -> FileChecksum:
        """Whole, as it now stands."""
        with storage_faults(f"write {self.path}"):
            self._file.close()
        return checksum_of(self.size, self.crc)


def checksum_of(size: int, crc: int) -> FileChecksum:
    """A record of what was computed."""
    return {"bytes": size, "crc32": f"{crc:08x}"}


def checksum_fault(name: str, entry: Any) -> str | None:
    """What is wrong with an entry of a file of checksums, if anything is."""
    # By its name alone: a link is followed, as those of the hub's cache lead out of the folder.
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        return "is no file in the folder"
    size, crc = (entry.get("bytes"), entry.get("crc32")) if isinstance(entry, dict) else (0, 0)
    if type(size) is not int or not isinstance(crc, str):
        return "has no size and checksum"
    return None


def file_checksum(path: Path) -> FileChecksum:
    """Checksum of one file; InputError if it cannot be read, StorageError if the disk fails."""
    size = crc = 0
    block = memoryview(bytearray(_BLOCK))
    with storage_faults(f"read {path}"), path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            size, crc = size + count, isal_zlib.crc32(block[:count], crc)
    return checksum_of(size, crc)


def crc_between(path: Path, start: int, stop: int, crc: int) -> int:
    """The checksum, `crc` until position `start`, at `stop`; OSError if the file ends before."""
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # read the disk, not the memory of what was meant for it
            os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)
        file.seek(start)
        while start < stop:
            count = file.readinto(block[: stop - start])
            if not count:
                raise OSError(errno.ENODATA, f"{path} has less than {stop} bytes")
            start, crc = start + count, isal_zlib.crc32(block[:count], crc)
    return crc


def _linux(name: str, *arguments: object) -> int:
    """Call a function of Linux's C library: its errno or 0; ENOSYS on other systems."""
    try:
        call = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (AttributeError, OSError, TypeError):
        return errno.ENOSYS
    return 0 if call(*arguments) == 0 else ctypes.get_errno()
