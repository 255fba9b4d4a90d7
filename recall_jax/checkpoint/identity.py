"""Which file it was that we opened, so that one put in its place, or written into, is noticed."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self


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
