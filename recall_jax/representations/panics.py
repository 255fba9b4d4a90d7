"""Libraries in Rust print on stderr, past Python, whenever they panic. The exception is enough."""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_alone = threading.RLock()  # the process has one stderr


@contextmanager
def unheard_panics() -> Iterator[None]:
    """Drop what is printed on stderr past Python if the block ends in an exception that panics are.

    All else that is printed meanwhile, by this thread or another, comes at the end of the block.
    """
    with _alone:
        held = _held()
        try:
            stderr = os.dup(2)
        except OSError:  # it is closed: nothing is heard anyway
            yield
            return
        os.dup2(held, 2)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = not isinstance(error, Exception | SystemExit | KeyboardInterrupt)
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            if size := os.lseek(held, 0, os.SEEK_END):
                printed = os.pread(held, size, 0)
                os.ftruncate(held, 0)
                os.lseek(held, 0, os.SEEK_SET)
                if not panicked:
                    os.write(2, printed)


@cache
def _held() -> int:
    """A file without a name for what is printed meanwhile, open as long as the process."""
    descriptor, name = tempfile.mkstemp()
    os.unlink(name)
    return descriptor
