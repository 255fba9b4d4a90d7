"""The runtime below Python: what it prints, and how it aborts.

Where processes are joined, C++ threads of jaxlib print their own affairs on both standard streams,
and when process 0 is lost they abort the others. Here that is heard, and becomes words of ours.
"""

import ctypes
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from recall_jax.errors import escaped

_TOLD = 1 << 16  # the last bytes of what the runtime has said are enough to know its reason
# What absl writes where the coordination service is gone.
_SERVICE_LOST = "JAX distributed service detected fatal errors"

_kept: list[Any] = []  # a handler is lost when Python forgets it


@dataclass(frozen=True)
class Runtime:
    """Where our own words go, and where the runtime's are kept; nowhere, if they are not hidden."""

    stderr: int
    chatter: int | None = None

    def say(self, line: str) -> None:
        """One line on stderr, from any thread, past all buffers."""
        os.write(self.stderr, f"{escaped(line)}\n".encode())

    def has_lost_service(self) -> bool:
        """Whether an abort was for the loss of process 0, and not a crash of another kind."""
        return self.chatter is None or _SERVICE_LOST in self._told()

    def last_words(self) -> str:
        """Why the runtime has aborted, in a line."""
        lines = [line.strip() for line in self._told().splitlines() if line.strip()]
        fatal = next((line for line in reversed(lines) if line.startswith("F")), "")
        reason = fatal.rpartition("absl::Status: ")[2] or (lines[-1] if lines else "")
        return reason or "it gave no reason"

    def _told(self) -> str:
        if self.chatter is None:
            return ""
        size = os.fstat(self.chatter).st_size
        told = os.pread(self.chatter, _TOLD, max(size - _TOLD, 0))
        return told.decode(errors="replace")


def hide_chatter() -> Runtime:
    """Let what is printed past Python go to a file that nobody sees, for the rest of the process.

    `sys.stdout` and `sys.stderr` still lead to where they did.
    """
    logging.getLogger("jax").setLevel(logging.CRITICAL)
    with tempfile.TemporaryFile(buffering=0) as file:
        chatter = os.dup(file.fileno())
    sys.stdout, _ = _moved(sys.stdout, 1, chatter)
    sys.stderr, stderr = _moved(sys.stderr, 2, chatter)
    return Runtime(stderr, chatter)


def _moved(stream: TextIO, number: int, chatter: int) -> tuple[TextIO, int]:
    """A stream on a duplicate of its file, and the duplicate; its number is for the chatter now."""
    stream.flush()
    try:
        kept = os.dup(number)
    except OSError:  # closed by whoever started us
        kept = os.open(os.devnull, os.O_WRONLY)
    os.dup2(chatter, number)
    # By line: what is said must not be lost where the process ends at once.
    moved = open(  # noqa: SIM115
        kept, "w", buffering=1, encoding=stream.encoding, errors=stream.errors, closefd=False
    )
    return moved, kept


def catch_abort(heard: Callable[[], None]) -> None:
    """Call `heard` in the thread that aborts, which then stands still for ever.

    Python's own handlers run in the main thread, after an abort; this one stands in for it.
    """

    def stand_still(number: int) -> None:
        heard()
        while True:
            time.sleep(3600)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(stand_still)
    _kept.append(handler)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
