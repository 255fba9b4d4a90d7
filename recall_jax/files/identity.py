"""Identify an opened file, so that a replacement of it or a change in it is noticed."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from recall_jax.files.checksums import file_checksum


@dataclass(frozen=True)
class FileIdentity:
    """Hold the device, inode, size in bytes and modification times of a file.

    Users can set `mtime_ns` back after they change the content, but not `ctime_ns`.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> Self:
        """Read the identity of the file at a path or behind a descriptor; OSError if missing."""
        status = os.stat(file)
        return cls(
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )


class OpenedFile:
    """Remember a file as it was when it was opened.

    If its checksum was taken since then, a file that was only touched, copied or mounted again
    counts as unchanged.
    """

    def __init__(self, path: Path, identity: FileIdentity) -> None:
        """Remember `identity` as the state in which the file at `path` was opened."""
        self.path = path
        self.identity = identity
        # The checksum, and the identity of the file when it was read.
        self._read: tuple[FileIdentity, str] | None = None

    def checksum(self) -> str:
        """Return the CRC-32 of the file as it is now, read again only if it may have changed."""
        now = FileIdentity.of(self.path)
        if self._read is None or self._read[0] != now:
            self._read = now, file_checksum(self.path)["crc32"]
        return self._read[1]

    def is_unchanged(self, now: FileIdentity) -> bool:
        """Return whether a file with the identity `now` still has the content that was opened."""
        if now == self.identity:
            return True
        if self._read is None or self._read[0] != self.identity or now.size != self.identity.size:
            return False
        known = self._read[1]
        if self.checksum() != known:
            return False
        self.identity = now
        return True
