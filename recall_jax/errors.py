"""The exceptions that mean: not the program but its input or the machine is at fault."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# Full, failing or lost: of a disk here, or one on the network.
_OF_THE_DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


class InputError(ValueError):
    """A fault of the user's: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class StorageError(InputError):
    """A disk that is full or cannot be read: nothing is wrong with the input as far as it went.

    Work that was finished before is worth keeping.
    """


@contextmanager
def storage_faults(doing: str) -> Iterator[None]:
    """Turn the operating system's refusals into "cannot `doing`: why", the disk's or the user's."""
    try:
        yield
    except OSError as error:
        kind = StorageError if error.errno in _OF_THE_DISK else InputError
        raise kind(f"cannot {doing}: {error.strerror or error}") from error
