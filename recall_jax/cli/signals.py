"""Ctrl-C and SIGTERM end a command in one line, with what it has begun undone or kept."""

import os
import signal
import sys
from types import FrameType
from typing import Any

STATUSES = {128 + signal.SIGINT: "interrupted", 128 + signal.SIGTERM: "terminated"}

_begun = False


def catch() -> None:
    """Take over both signals, unless they are ignored, as in a shell's background job."""
    global _begun
    _begun = False
    # typer would catch a KeyboardInterrupt, and lose the notes on how to go on
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    sys.unraisablehook = _again


def begin() -> None:
    """From now on there may be something to undo: a signal becomes a SystemExit."""
    global _begun
    _begun = True


def _stop(number: int, frame: FrameType | None) -> None:
    status = 128 + number
    if not _begun:  # and an exception while jaxlib is being imported would crash it
        os.write(2, f"recall: {STATUSES[status]}\n".encode())
        os._exit(status)
    raise SystemExit(status)


def _again(unraisable: Any) -> None:
    """Python drops an exception raised in a callback of its memory management: raise it later."""
    status = getattr(unraisable.exc_value, "code", None)
    if status not in STATUSES:
        # a read of Orbax's that ended after another of them had failed
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)
        return
    signal.signal(signal.SIGALRM, lambda number, frame: _stop(status - 128, frame))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
