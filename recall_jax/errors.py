"""Define the errors that blame the input or the machine rather than the program."""

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from reprlib import Repr

# Errors that the user can fix: names, kinds of file, permissions. Any other is the disk's.
_USER_ERRORS = {
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
    """Report a mistake of the user in one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class UnfinishedError(InputError):
    """Report that the work cannot continue here and now, although its results so far are good.

    The results finished before are kept.
    """


class StorageError(UnfinishedError):
    """Report that a disk is full, or cannot be read or written."""


# The messages of XLA and of the libraries it calls, on accelerators and on CPU.
_NO_MEMORY = re.compile(
    "RESOURCE_EXHAUSTED|out of memory|bad_alloc|failed to allocate|cannot allocate memory", re.I
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means that the host or a device ran out of memory.

    Recognizes the errors of Python, the operating system and XLA, also as the cause of another one.
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
    """Turn an OSError into "cannot `doing`: why": InputError or StorageError."""
    try:
        yield
    except OSError as error:
        kind = InputError if error.errno in _USER_ERRORS else StorageError
        raise kind(f"cannot {doing}: {error.strerror or error}") from error


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn whatever a malformed `where` makes a library raise into one InputError that names it.

    Wraps every parser of outside data; panics of Rust and endless recursion are among the faults.
    An InputError, a lack of memory and signals pass unchanged.
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
        if isinstance(error.__cause__ or error.__context__, SystemExit):  # a signal during C code
            raise
        raise InputError(
            f"{where} is damaged, or not what it should be: {type(error).__name__}: {brief(error)}"
        ) from error


@contextmanager
def running_user_code(failure: str) -> Iterator[None]:
    """Turn whatever the user's Python code raises, its sys.exit included, into an InputError.

    Its message begins with `failure`. A signal, which is a SystemExit above 128, passes unchanged.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
            raise
        raise InputError(f"{failure}: {type(error).__name__}: {brief(error, 300)}") from error


# Control characters, lone surrogates, and marks that reorder or hide the text next to them.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff]"
)


def escaped(text: str, kept: str = "") -> str:
    r"""Return `text` with every control character spelled out, such as \\x1b or \\u202e.

    Neither a terminal nor a page can then obey it. The characters in `kept` stay.
    """
    return _UNPRINTABLE.sub(
        lambda found: found[0] if found[0] in kept else ascii(found[0])[1:-1], text
    )


def shown(value: object, limit: int = 200) -> str:
    """Return the repr of an input value for a message, escaped, at most `limit` characters long.

    Takes little time however large or deeply nested the value is.
    """
    return _truncated(escaped(_SHORT.repr(value)), limit)


def some(names: Iterable[object], limit: int = 4) -> str:
    """List the first `limit` names for a message, each at most 80 characters, and their number."""
    every = list(names)
    more = f", … ({len(every)} in all)" if len(every) > limit else ""
    return ", ".join(brief(str(name), 80) for name in every[:limit]) + more


def brief(message: BaseException | str, limit: int = 200) -> str:
    """Return an exception's text or a string as one escaped line of at most `limit` characters."""
    return _truncated(escaped(" ".join(str(message).split())), limit)


def _truncated(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


class _Short(Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out, as it does to read, a number of thousands of digits
        return super().repr_int(x, level) if x.bit_length() < 4096 else "a number of many digits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 160
_SHORT.maxlong = 60
