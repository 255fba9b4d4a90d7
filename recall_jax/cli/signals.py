"""End a command in one line on Ctrl-C, SIGTERM or a hang-up, with its work undone or kept."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

from recall_jax.files.interruption import STOPPING

_SAID = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
STATUSES: dict[int, str] = {128 + number: _SAID[number.name] for number in STOPPING}

_begun = _stopping = False


def catch() -> None:
    """Handle the signals, unless they are ignored, as in a shell's background job."""
    global _begun, _stopping
    _begun = _stopping = False
    # typer would catch a KeyboardInterrupt, and lose the notes on how to resume.
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    sys.unraisablehook = _again


def begin() -> None:
    """Turn signals into a SystemExit from now on, since there may be work to undo."""
    global _begun
    _begun = True


def _stop(number: int, frame: FrameType | None) -> None:
    global _stopping
    status = 128 + number
    if not _begun:  # an exception while jaxlib is being imported would crash it
        with suppress(OSError):  # the terminal has hung up
            os.write(2, f"recall: {STATUSES[status]}\n".encode())
        os._exit(status)
    if not _stopping:  # ignore a second signal while the first is handled
        _stopping = True
        raise SystemExit(status)


def _again(unraisable: Any) -> None:
    """Raise SystemExit again later: Python drops exceptions raised in its memory management."""
    global _stopping
    status = getattr(unraisable.exc_value, "code", None)
    if status not in STATUSES:
        # Ignore a read of Orbax that ended after another one had failed.
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)
        return
    _stopping = False
    signal.signal(signal.SIGALRM, lambda number, frame: _stop(status - 128, frame))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
