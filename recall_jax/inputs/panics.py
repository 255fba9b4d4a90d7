"""Suppress what Rust libraries print past Python when they panic or meet unknown options."""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_lock = threading.RLock()  # the process has one stderr


@contextmanager
def silenced_panics() -> Iterator[None]:
    """Drop output that bypasses Python: all on stdout, and on stderr if the block ends in a panic.

    Any other output on stderr, from this thread or another, is written at the end.
    """
    captured = _capture()
    with _lock:
        panicked = False
        try:
            with _redirected(_devnull(), 1), _redirected(captured, 2):
                yield
        except BaseException as error:
            panicked = not isinstance(error, Exception | SystemExit | KeyboardInterrupt)
            raise
        finally:
            if size := os.lseek(captured, 0, os.SEEK_END):
                printed = os.pread(captured, size, 0)
                os.ftruncate(captured, 0)
                os.lseek(captured, 0, os.SEEK_SET)
                if not panicked:
                    os.write(2, printed)


@contextmanager
def _redirected(descriptor: int, stream: int) -> Iterator[None]:
    """Redirect a stream to an open file; a closed stream stays closed."""
    try:
        before = os.dup(stream)
    except OSError:
        yield
        return
    os.dup2(descriptor, stream)
    try:
        yield
    finally:
        os.dup2(before, stream)
        os.close(before)


@cache
def _devnull() -> int:
    return os.open(os.devnull, os.O_WRONLY)


@cache
def _capture() -> int:
    """Open an unnamed file for the output, for the lifetime of the process."""
    descriptor, name = tempfile.mkstemp()
    os.unlink(name)
    return descriptor
