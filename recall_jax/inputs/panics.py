"""Libraries in Rust print past Python: whenever they panic, and of options they do not know."""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_alone = threading.RLock()  # the process has one stderr


@contextmanager
def unheard_panics() -> Iterator[None]:
    """Drop what is printed past Python, on stderr only if the block ends in a panic's exception.

    All else that comes on stderr meanwhile, from this thread or another, is heard at the end.
    """
    held = _held()
    with _alone:
        panicked = False
        try:
            with _led_to(_nowhere(), 1), _led_to(held, 2):
                yield
        except BaseException as error:
            panicked = not isinstance(error, Exception | SystemExit | KeyboardInterrupt)
            raise
        finally:
            if size := os.lseek(held, 0, os.SEEK_END):
                printed = os.pread(held, size, 0)
                os.ftruncate(held, 0)
                os.lseek(held, 0, os.SEEK_SET)
                if not panicked:
                    os.write(2, printed)


@contextmanager
def _led_to(descriptor: int, stream: int) -> Iterator[None]:
    """Let a stream lead to an open file; a stream that is closed stays so."""
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
def _nowhere() -> int:
    return os.open(os.devnull, os.O_WRONLY)


@cache
def _held() -> int:
    """A file without a name for what is printed meanwhile, open as long as the process."""
    descriptor, name = tempfile.mkstemp()
    os.unlink(name)
    return descriptor
