"""Signals that wait: what is being put in its place, or cleared away, is finished first.

Python runs the handler of a signal between any two steps of the main thread. An exception that one
raises in the midst of clearing up would leave the rest lying about.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGHUP: the terminal is gone, as with a lost connection. Windows has none.
STOPPING: list[signal.Signals] = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let the signals that stop a program wait until the block has ended; then the first acts."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no handler runs here
        return
    waiting: list[int] = []
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    handlers = {number: kept for number, kept in handlers.items() if kept is not None}  # C's own
    holding = True

    def hold(number: int, frame: FrameType | None) -> None:
        kept = handlers[signal.Signals(number)]
        if holding:
            waiting.append(number)
        elif callable(kept):  # one came before all were given back
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
