"""End the command with one line and status 2 when bytes of a mapped file are lost.

Weights are read through memory maps. If a file is truncated, or its disk fails, after its bytes
were mapped, the system sends SIGBUS to the thread that touches them, which may be one of XLA, and
the process would die without a message. Python's signal handlers run between two bytecodes, which
that thread never reaches again: only a C handler runs in time, here one made by ctypes. Like every
callback it waits for the interpreter's lock, which is safe because it never returns.
"""

import ctypes
import os
import signal
import sys
import threading

from recall_jax.errors import escaped

_SA_SIGINFO = 4
_ADDRESS_OFFSET = 16 if sys.maxsize > 2**32 else 12  # of si_addr in siginfo_t, signal.h
_ADVICE = (  # for a failed disk and for a changed file
    "restore it, then run the same command again "
    "(--resume continues a merge where it stopped, if the file is as it was)\n"
)

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_first = threading.Lock()


class _Action(ctypes.Structure):
    """Mirror struct sigaction of Linux's C libraries."""

    _fields_ = (
        ("handler", _Handler),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def explain_lost_bytes() -> None:
    """Install a handler that ends the process with a line on stderr when it touches lost bytes.

    Has an effect on Linux only.
    """
    if sys.platform == "linux":
        action = _Action(handler=_explain, flags=_SA_SIGINFO)
        ctypes.CDLL(None).sigaction(signal.SIGBUS, ctypes.byref(action), None)


@_Handler
def _explain(number: int, info: int, context: int) -> None:
    # Several threads may fault at once; all but the first wait here until the process exits.
    _first.acquire()
    try:
        path = _mapped_file(ctypes.c_size_t.from_address(info + _ADDRESS_OFFSET).value)
        # Clear the line of a progress bar, and show the cursor that it has hidden.
        clear = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""
        line = f"recall: {escaped(path)} was truncated or could not be read while it was in use: "
        os.write(2, os.fsencode(clear + line + _ADVICE))
    finally:
        os._exit(2)


def _mapped_file(address: int) -> str:
    """Return the file mapped at an address, by /proc/self/maps; see proc(5)."""
    with open("/proc/self/maps", errors="surrogateescape") as maps:
        for line in maps:
            begin, end = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
            path = line.rstrip("\n").split(maxsplit=5)[5:]
            if begin <= address < end and path:
                return path[0].removesuffix(" (deleted)")
    return "a file"
