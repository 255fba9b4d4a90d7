"""What becomes of the command when bytes of a mapped file are gone: one line and status 2.

Weights are read through memory maps. Where a file is cut short, or its disk fails, after its bytes
were mapped, the system sends SIGBUS to whichever thread touches them, XLA's included, and the
process would die without a word. Python's own signal handlers run between two bytecodes, to which
that thread never comes back: only a handler of C's runs in time, here one made by ctypes. It has
to wait for the interpreter's lock, as every callback; it may, as it never returns.
"""

import ctypes
import os
import signal
import sys
import threading

from recall_jax.errors import escaped

_SA_SIGINFO = 4
_ADDRESS_OFFSET = 16 if sys.maxsize > 2**32 else 12  # of si_addr in siginfo_t, signal.h
_ADVICE = (  # for a disk that failed, and for a file that was changed
    "restore it, then run the same command again "
    "(--resume goes on where a merge stopped, if the file is as it was)\n"
)

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_first = threading.Lock()


class _Action(ctypes.Structure):
    """struct sigaction of Linux's C libraries."""

    _fields_ = (
        ("handler", _Handler),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def explain_lost_bytes() -> None:
    """From now on, end the process with a line on stderr where it touches bytes that are gone.

    Linux only; nothing happens elsewhere.
    """
    if sys.platform == "linux":
        action = _Action(handler=_explain, flags=_SA_SIGINFO)
        ctypes.CDLL(None).sigaction(signal.SIGBUS, ctypes.byref(action), None)


@_Handler
def _explain(number: int, info: int, context: int) -> None:
    # Several threads may fault at once; those that come later wait here for the end.
    _first.acquire()
    try:
        path = _mapped_file(ctypes.c_size_t.from_address(info + _ADDRESS_OFFSET).value)
        # a progress bar leaves its line, and the cursor hidden
        clear = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""
        line = f"recall: {escaped(path)} was cut short or could not be read while it was in use: "
        os.write(2, os.fsencode(clear + line + _ADVICE))
    finally:
        os._exit(2)


def _mapped_file(address: int) -> str:
    """The file that is mapped at an address, by /proc/self/maps; see proc(5)."""
    with open("/proc/self/maps", errors="surrogateescape") as maps:
        for line in maps:
            begin, end = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
            path = line.rstrip("\n").split(maxsplit=5)[5:]
            if begin <= address < end and path:
                return path[0].removesuffix(" (deleted)")
    return "a file"
