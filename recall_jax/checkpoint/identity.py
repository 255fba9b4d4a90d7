"""Which file it was that we opened, so that one put in its place, or written into, is noticed."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from recall_jax.errors import InputError, StorageError

# What a disk that fails, or a server that is gone, says; all else is about the path as given.
_STORAGE_FAULTS = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT})


@dataclass(frozen=True)
class FileIdentity:
    """Device, inode, size in bytes and time of the last change of one file."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> Self:
        """Of the file at a path, or of the one open as a descriptor; OSError if it has none."""
        status = os.stat(file)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def cannot_read(path: Path, error: OSError) -> InputError:
    """The error to raise where the system did not let us read: whose fault, in one line."""
    kind = StorageError if error.errno in _STORAGE_FAULTS else InputError
    return kind(f"cannot read {path}: {error.strerror}")
