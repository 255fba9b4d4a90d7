"""The exceptions that mean: not the program but its input or the machine is at fault."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# What the user can put right before the work: names, kinds and permissions. All else is the disk's.
_OF_THE_USER = {
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOTEMPTY,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EXDEV,
}


class InputError(ValueError):
    """A fault of the user's: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class UnfinishedError(InputError):
    """The work cannot go on here and now, though nothing is wrong with it as far as it went.

    What was finished before is worth keeping.
    """


class StorageError(UnfinishedError):
    """A disk that is full, or cannot be read or written."""


@contextmanager
def storage_faults(doing: str) -> Iterator[None]:
    """Turn the operating system's refusals into "cannot `doing`: why", the disk's or the user's."""
    try:
        yield
    except OSError as error:
        kind = InputError if error.errno in _OF_THE_USER else StorageError
        raise kind(f"cannot {doing}: {error.strerror or error}") from error
