"""Send requests to the process that runs other people's patterns and templates, and end it."""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from recall_jax.errors import storage_faults
from recall_jax.foreign.worker import MEMORY, SECONDS

_PROGRAM = Path(__file__).with_name("worker.py")
# The threads of a library would use up the little memory that the process may have.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}


class ForeignError(Exception):
    """Report, in one line, that a pattern or template raised an error or ran over its limits."""


def run_limited(call: str, **arguments: Any) -> Any:
    """Call a function of `foreign.worker` in the other process and return its value, which is JSON.

    Arguments that are not JSON values are passed as text. Raises ForeignError if the call fails,
    takes more than 2 seconds of processor time or 1 GiB of memory, or returns too long a text.
    """
    try:
        request = json.dumps({"call": call, "arguments": arguments}, default=str) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ForeignError(f"its arguments are not JSON: {error}") from error
    with _LOCK:
        reply = _worker().ask(request)
    if "error" in reply:
        raise ForeignError(reply["error"])
    return reply["value"]


class _Worker:
    """Hold the process, which is started at the first request and ends with this program."""

    def __init__(self) -> None:
        with storage_faults(f"start {sys.executable}"):
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | _ONE_THREAD,
                start_new_session=True,  # Ctrl-C reaches only this process
            )
        self.owner = os.getpid()

    @property
    def is_ours(self) -> bool:
        return self.owner == os.getpid() and self._process.poll() is None

    def ask(self, request: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        except BaseException:  # nobody waits for the answer any more
            self.end()
            raise
        return json.loads(reply) if reply else {"error": self._why_it_ended()}

    def _why_it_ended(self) -> str:
        self.end()
        if self._process.returncode == -signal.SIGPROF:
            return f"it takes more than {SECONDS} seconds"
        return f"it ends the process that runs it, which may take {MEMORY:,} bytes"

    def end(self) -> None:
        if self.owner != os.getpid():
            return
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(1)  # it ends when its input is closed
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_LOCK = threading.Lock()
_WORKERS: list[_Worker] = []


def _worker() -> _Worker:
    while _WORKERS and not _WORKERS[-1].is_ours:
        _WORKERS.pop().end()
    if not _WORKERS:
        _WORKERS.append(_Worker())
    return _WORKERS[-1]


@atexit.register
def _end() -> None:
    for worker in _WORKERS:
        worker.end()
