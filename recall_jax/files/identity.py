"""Which file it was that we opened, so that one put in its place, or written into, is noticed."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from recall_jax.files.checksums import file_checksum


@dataclass(frozen=True)
class FileIdentity:
    """Device, inode, size in bytes and times of the last change of one file.

    `mtime_ns` can be set back after a change of the content, `ctime_ns` cannot.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> Self:
        """Of the file at a path, or of the one open as a descriptor; OSError if it has none."""
        status = os.stat(file)
        return cls(
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )


class OpenedFile:
    """A file as it was when it was opened.

    Where its checksum was taken since, one that was only touched, copied with its content or
    mounted again is still the same.
    """

    def __init__(self, path: Path, identity: FileIdentity) -> None:
        """What is to be held against the file at `path` later on."""
        self.path = path
        self.identity = identity
        self._read: tuple[FileIdentity, str] | None = None  # what was read for the checksum, and it

    def checksum(self) -> str:
        """CRC-32 of the whole file as it is now, read again only where it may have changed."""
        now = FileIdentity.of(self.path)
        if self._read is None or self._read[0] != now:
            self._read = now, file_checksum(self.path)["crc32"]
        return self._read[1]

    def is_unchanged(self, now: FileIdentity) -> bool:
        """Whether a file of the identity `now` has the content that was opened, for all we know."""
        if now == self.identity:
            return True
        if self._read is None or self._read[0] != self.identity or now.size != self.identity.size:
            return False
        known = self._read[1]
        if self.checksum() != known:
            return False
        self.identity = now
        return True
