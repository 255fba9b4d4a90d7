"""Hide what the runtime below Python prints, and catch its aborts.

When processes are connected, C++ threads of jaxlib print messages on both standard streams, and
abort the other processes when process 0 is lost. This module catches both and reports in our words.
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

_TAIL = 1 << 16  # the last bytes of the runtime's output, enough to find its reason
# absl writes this when the coordination service is lost.
_SERVICE_LOST = "JAX distributed service detected fatal errors"

_kept: list[Any] = []  # keeps handlers from being garbage-collected


@dataclass(frozen=True)
class Runtime:
    """Hold descriptors: where our messages go, and where the runtime's are hidden, if they are."""

    stderr: int
    hidden: int | None = None

    def say(self, line: str) -> None:
        """Write one line to stderr, from any thread, past all buffers."""
        os.write(self.stderr, f"{escaped(line)}\n".encode())

    def has_lost_service(self) -> bool:
        """Return whether the runtime aborted because process 0 was lost, not in another crash."""
        return self.hidden is None or _SERVICE_LOST in self._recent_output()

    def abort_reason(self) -> str:
        """Return the reason of the runtime's abort in one line."""
        lines = [line.strip() for line in self._recent_output().splitlines() if line.strip()]
        fatal = next((line for line in reversed(lines) if line.startswith("F")), "")
        reason = fatal.rpartition("absl::Status: ")[2] or (lines[-1] if lines else "")
        return reason or "it gave no reason"

    def _recent_output(self) -> str:
        """Return the end of what the runtime has printed."""
        if self.hidden is None:
            return ""
        size = os.fstat(self.hidden).st_size
        text = os.pread(self.hidden, _TAIL, max(size - _TAIL, 0))
        return text.decode(errors="replace")


def hide_output() -> Runtime:
    """Redirect output that bypasses Python to a hidden file, for the rest of the process.

    `sys.stdout` and `sys.stderr` still write where they did.
    """
    logging.getLogger("jax").setLevel(logging.CRITICAL)
    with tempfile.TemporaryFile(buffering=0) as file:
        hidden = os.dup(file.fileno())
    sys.stdout, _ = _moved(sys.stdout, 1, hidden)
    sys.stderr, stderr = _moved(sys.stderr, 2, hidden)
    return Runtime(stderr, hidden)


def _moved(stream: TextIO, number: int, hidden: int) -> tuple[TextIO, int]:
    """Move a stream to a duplicate of its descriptor, and redirect the original to `hidden`."""
    stream.flush()
    try:
        kept = os.dup(number)
    except OSError:  # closed by the parent process
        kept = os.open(os.devnull, os.O_WRONLY)
    os.dup2(hidden, number)
    # Line-buffered, so that nothing is lost if the process ends at once.
    moved = open(  # noqa: SIM115
        kept, "w", buffering=1, encoding=stream.encoding, errors=stream.errors, closefd=False
    )
    return moved, kept


def catch_abort(on_abort: Callable[[], None]) -> None:
    """Call `on_abort` in the thread that aborts, and then block that thread for ever.

    Python's signal handlers would only run in the main thread, after the abort.
    """

    def handle_and_block(number: int) -> None:
        on_abort()
        while True:
            time.sleep(3600)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle_and_block)
    _kept.append(handler)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
