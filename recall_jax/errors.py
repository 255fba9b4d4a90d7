"""The exceptions that mean: not the program but its input or the machine is at fault."""

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from reprlib import Repr

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


# As XLA and the libraries below it say it, on devices and on CPU.
_NO_MEMORY = re.compile(
    "RESOURCE_EXHAUSTED|out of memory|bad_alloc|failed to allocate|cannot allocate memory", re.I
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice: the machine's or a device's, as Python, the system, XLA say.

    So too where another error came of it.
    """
    seen: list[BaseException | None] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if (
            isinstance(cause, MemoryError)
            or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
            or _NO_MEMORY.search(str(cause))
        ):
            return True
        seen.append(cause)
        cause = cause.__cause__
    return False


@contextmanager
def storage_faults(doing: str) -> Iterator[None]:
    """Turn the operating system's refusals into "cannot `doing`: why", the disk's or the user's."""
    try:
        yield
    except OSError as error:
        kind = InputError if error.errno in _OF_THE_USER else StorageError
        raise kind(f"cannot {doing}: {error.strerror or error}") from error


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn whatever a malformed `where` makes a library raise into one InputError that names it.

    For the boundary of everything that is read: panics of Rust and endless recursion are among the
    faults. Errors that say what they mean already, a machine without memory and signals pass.
    """
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except OSError:
        with storage_faults(f"read {where}"):
            raise
    except BaseException as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error.__cause__ or error.__context__, SystemExit):  # a signal inside of C
            raise
        raise InputError(
            f"{where} is damaged, or not what it should be: {type(error).__name__}: {brief(error)}"
        ) from error


# Control characters, lone surrogates, and the marks that reorder or hide what stands beside them.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff]"
)


def escaped(text: str, kept: str = "") -> str:
    r"""`text` as it reads: what a terminal or a page would obey is written as \x1b, \u202e.

    All but the characters `kept`.
    """
    return _UNPRINTABLE.sub(
        lambda found: found[0] if found[0] in kept else ascii(found[0])[1:-1], text
    )


def shown(value: object, limit: int = 200) -> str:
    """A value of the input as a message shows it: its repr, escaped, of at most `limit` characters.

    Quick however large or deep the value is.
    """
    return _cut(escaped(_SHORT.repr(value)), limit)


def some(names: Iterable[object], limit: int = 4) -> str:
    """The first few names as a message lists them, each cut to 80 characters, and their number."""
    every = list(names)
    more = f", … ({len(every)} in all)" if len(every) > limit else ""
    return ", ".join(brief(str(name), 80) for name in every[:limit]) + more


def brief(said: BaseException | str, limit: int = 200) -> str:
    """What an exception or a text says: one line, escaped, of at most `limit` characters."""
    return _cut(escaped(" ".join(str(said).split())), limit)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


class _Short(Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out, as it does to read, a number of thousands of digits
        return super().repr_int(x, level) if x.bit_length() < 4096 else "a number of many digits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 160
_SHORT.maxlong = 60
