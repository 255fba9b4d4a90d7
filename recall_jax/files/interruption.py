"""Delay signals until an output is published or cleaned up.

Python runs a signal handler between any two steps of the main thread. An exception raised by a
handler in the middle of a cleanup would leave the rest of the files behind.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGHUP: the terminal was closed or the connection lost. Windows has no such signal.
STOPPING: list[signal.Signals] = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay the signals that stop a program until the block ends; then raise the first of them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers run only in the main thread
        return
    waiting: list[int] = []
    found = {number: signal.getsignal(number) for number in STOPPING}
    # None is a handler that was not set from Python, and cannot be restored.
    handlers = {number: kept for number, kept in found.items() if kept is not None}
    holding = True

    def hold(number: int, frame: FrameType | None) -> None:
        kept = handlers[signal.Signals(number)]
        if holding:
            waiting.append(number)
        elif callable(kept):  # it came while the handlers are restored
            kept(number, frame)

    try:
        for number, kept in handlers.items():
            if kept is not signal.SIG_IGN:
                signal.signal(number, hold)
        yield
    finally:
        holding = False
        for number, kept in handlers.items():
            signal.signal(number, kept)
        if waiting:
            signal.raise_signal(waiting[0])
