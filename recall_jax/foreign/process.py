"""Ask the process in which patterns and templates of others run, and end it where it must be."""

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
# Threads of a library's take memory, of which there is little.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}


class ForeignError(Exception):
    """What a pattern or template raised, or that it ran over its limits; one line."""


def ask(call: str, **arguments: Any) -> Any:
    """The value of a call of `foreign.worker`, whose arguments are JSON values.

    What is no JSON value in them is its text. Raises ForeignError where it fails, takes more than 2
    seconds of the processor or 1 GiB of memory, or makes too long a text.
    """
    try:
        request = json.dumps({"call": call, "arguments": arguments}, default=str) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ForeignError(f"it is given what is no JSON: {error}") from error
    with _LOCK:
        reply = _worker().ask(request)
    if "error" in reply:
        raise ForeignError(reply["error"])
    return reply["value"]


class _Worker:
    """The process, started at the first request and ended with us."""

    def __init__(self) -> None:
        with storage_faults(f"start {sys.executable}"):
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | _ONE_THREAD,
                start_new_session=True,  # a Ctrl-C is ours to answer
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
        except BaseException:  # an answer that nobody waits for any more
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
            self._process.wait(1)  # it ends when nothing is asked any more
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
