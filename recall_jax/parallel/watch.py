"""End all processes of a pod when one ends, each with one line and within a minute.

How the others notice:

- a process that fails, or is interrupted, writes this to the store and waits until it is seen;
- if a process dies or is silent, the coordination service misses its heartbeats, and a thread of
  each other process asks for them; if a program breaks because of it, a roll call is faster;
- if process 0 dies, and the service with it, the runtime aborts, and a handler catches that.

A main thread that is waiting raises an error; one that is stuck in a program is ended by another
thread.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import NoReturn

from recall_jax.errors import InputError, UnfinishedError, is_out_of_memory
from recall_jax.parallel.processes import (
    CONNECT_TIMEOUT,
    HEARTBEAT_TIMEOUT,
    NUMBER,
    Processes,
    connect,
)
from recall_jax.parallel.runtime import Runtime, catch_abort, hide_output

ADVICE = "what is done is kept: start all processes again with --resume to go on"

_POLL = 0.25  # seconds between two reads of the store
_ROLL_CALL = 4.0  # seconds within which a live process answers
_GRACE = 3.0  # seconds for a main thread to unwind, and for the others to notice an end

_ENDED, _SEEN, _CALL, _HERE = "watch/ended", "watch/seen", "watch/call", "watch/here"
_SIGNALS = {129: "was hung up", 130: "was interrupted", 143: "was terminated"}


@dataclass(frozen=True)
class Ending:
    """Record which process ended the run, and the line that the others print."""

    process: int
    line: str

    def error(self) -> UnfinishedError:
        """Return the error to raise in the other processes, whose results so far are good.

        It is an UnfinishedError even if that process blames its input: the fault may be its
        machine's, such as a disk that is not mounted.
        """
        return UnfinishedError(self.line)


@contextmanager
def joined(
    *, advice: str = ADVICE, debug: bool = False, timeout: int = CONNECT_TIMEOUT
) -> Iterator[Processes]:
    """Yield the connected processes of this run, until all of them have ended their blocks.

    If the block of one fails, or a process is lost, the blocks of the others raise UnfinishedError
    with one line that names it; if a block is stuck in a program, the line is printed and the
    process exits with status 2. `advice` tells the user how to resume. Call it once in a process;
    the runtime's output is hidden from then on, unless `debug`. Raises InputError if the processes
    do not find each other, as `connect` does.
    """
    runtime = Runtime(2) if debug else hide_output()
    connecting = _Connecting(runtime)
    catch_abort(connecting.on_abort)
    processes = connect(timeout=timeout, failed=connecting.failed)
    watch = _Watch(processes, runtime, advice)
    connecting.watch = watch
    watch.start()
    watched = replace(processes, check=watch.check)
    try:
        _agree(watched)
        yield watched
        watched.barrier("end")
    except BaseException as error:
        ending = watch.ending_behind(error)
        watch.leave()
        if ending is None:
            watch.report(error)
            raise
        raised = ending.error()
        if advice not in ending.line:
            for note in getattr(error, "__notes__", ()):
                raised.add_note(note)
        raise raised from (error if debug else None)
    watch.leave()
    # Process 0 has the store, so it ends last.
    _try(lambda: processes.publish(f"left/{processes.index}", None))
    if processes.index == 0:
        _wait(lambda: len(processes.store.under("recall/left")) == processes.count)


def _agree(processes: Processes) -> None:
    """Raise InputError if process 0 was started with another number of processes."""
    count = processes.broadcast("count", lambda: processes.count)
    if count != processes.count:
        raise InputError(
            f"process {processes.index} was started as one of {processes.count}, process 0 as one "
            f"of {count}: set {NUMBER} to the same for all"
        )


class _Connecting:
    """Pass an abort to the watch, or keep its reason until there is a watch."""

    def __init__(self, runtime: Runtime) -> None:
        self.watch: _Watch | None = None
        self._runtime = runtime
        self._why: str | None = None

    def on_abort(self) -> None:
        """Handle an abort, in the thread that aborts."""
        if self.watch is None:
            self._why = self._runtime.abort_reason()
        else:
            self.watch.on_abort()

    def failed(self) -> str | None:
        """Return why the runtime has aborted, or None."""
        return self._why


class _Watch:
    """Watch the other processes in threads."""

    def __init__(self, processes: Processes, runtime: Runtime, advice: str) -> None:
        self._processes, self._store = processes, processes.store
        self._runtime, self._advice = runtime, advice
        self._lock = threading.Lock()
        self._left = False  # the main thread ends by itself: no other thread may end the process
        self.ending: Ending | None = None

    def start(self) -> None:
        """Start both threads, which end with the process."""
        for work in (self._poll_store, self._poll_heartbeats):
            threading.Thread(target=work, daemon=True).start()

    def check(self) -> None:
        """Raise UnfinishedError if another process has ended."""
        if self.ending is not None:
            raise self.ending.error()

    def leave(self) -> None:
        """Stop other threads from ending the process: the main thread does it from now on."""
        with self._lock:
            self._left = True
        if self.ending is not None:
            self._wait_for_others(self.ending.process)

    def ending_behind(self, error: BaseException) -> Ending | None:
        """Return the ending of another process that caused `error` here, if any.

        A broken program only shows that one of the others is gone, so a roll call finds out which.
        A signal concerns only this process, even if all have received it.
        """
        if not isinstance(error, Exception):
            return None
        if self.ending is None and _is_broken_program(error):
            try:
                self._call_the_roll()
            except Exception:  # the store is lost: an abort will follow and report it
                _wait(lambda: self.ending is not None, HEARTBEAT_TIMEOUT + _GRACE)
        return self.ending

    def report(self, error: BaseException) -> None:
        """Report that this process ends, and wait until the others know."""
        index = self._processes.index
        ending = Ending(index, self._in_words(error))
        _try(lambda: self._store.put(_ENDED, json.dumps(asdict(ending))))
        self._wait_for_others(index)

    def on_abort(self) -> None:
        """Report an abort, in the thread that aborts; the store does not answer any more."""
        with self._lock:
            if self._left:
                return
            index = self._processes.index
            if index and self._runtime.has_lost_service():
                line = self._lost(0).line
            else:
                line = (
                    f"{self._name(index)} crashed: {self._runtime.abort_reason()}: {self._advice}"
                )
            self._speak((self.ending and self.ending.line) or line)

    def _poll_store(self) -> None:
        """Poll the store for the end of another process, and for a roll call."""
        here = f"{_HERE}/{self._processes.index}"
        answered = False
        while not self._left:
            with suppress(Exception):  # the service is lost: the abort will follow
                if text := self._store.get(_ENDED):
                    self._end(Ending(**json.loads(text)))
                    return
                if not answered and self._store.get(_CALL) is not None:
                    answered = self._store.put(here, "")
            time.sleep(_POLL)

    def _poll_heartbeats(self) -> None:
        """Poll the service for processes whose heartbeats are missing."""
        everyone = set(range(self._processes.count))
        while not self._left:
            with suppress(Exception):
                if lost := everyone - self._store.alive():
                    self._find(self._lost(min(lost)))
            time.sleep(1)

    def _find(self, ending: Ending) -> None:
        """Write an ending found here to the store, unless one is there already."""
        with suppress(Exception):
            self._store.put(_ENDED, json.dumps(asdict(ending)))
            if text := self._store.get(_ENDED):
                ending = Ending(**json.loads(text))
        self.ending = self.ending or ending

    def _end(self, ending: Ending) -> None:
        """End the run: let the main thread raise, or else end the process."""
        self.ending = self.ending or ending
        with suppress(Exception):
            self._store.put(f"{_SEEN}/{self._processes.index}", "")
        _wait(lambda: self._left)
        with self._lock:
            if self._left:
                return
            self._wait_for_others(self.ending.process)
            self._speak(self.ending.line)

    def _speak(self, line: str) -> NoReturn:
        """Print a line and exit, in place of a main thread that cannot."""
        self._runtime.say(f"recall: {line}")
        os._exit(2)

    def _wait_for_others(self, ended: int) -> None:
        """Wait, in process 0, until the others have seen the ending: the store ends with it."""
        if self._processes.index:
            return
        others = self._processes.count - 1 - (ended != 0)
        with suppress(Exception):
            _wait(lambda: len(set(self._store.under(_SEEN)) - {"0", str(ended)}) >= others)

    def _call_the_roll(self) -> None:
        """Find a process that does not answer."""
        self._store.put(_CALL, "")
        others = set(range(self._processes.count)) - {self._processes.index}

        def missing() -> set[int]:
            return others - set(map(int, self._store.under(_HERE)))

        _wait(lambda: self.ending is not None or not missing(), _ROLL_CALL)
        if self.ending is None and (lost := missing()):
            self._find(self._lost(min(lost)))

    def _lost(self, index: int) -> Ending:
        return Ending(index, f"{self._name(index)} was lost: {self._advice}")

    def _in_words(self, error: BaseException) -> str:
        name = self._name(self._processes.index)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            code = error.code if isinstance(error, SystemExit) else 130
            how = _SIGNALS.get(code, "ended") if isinstance(code, int) else "ended"
            return f"{name} {how}: {self._advice}"
        message = " ".join(str(error).split())
        if _is_users(error):
            return f"{name} ended: {message}"
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        return f"{name} ended: {kind}{message}: {self._advice}"

    def _name(self, index: int) -> str:
        return f"process {index} of {self._processes.count}"


def _is_users(error: BaseException) -> bool:
    """Return whether an input is wrong, so that no result is worth keeping."""
    return isinstance(error, InputError) and not isinstance(error, UnfinishedError)


def _is_broken_program(error: BaseException) -> bool:
    """Return whether the runtime may have failed, which raises errors of several kinds."""
    return not (isinstance(error, InputError | OSError) or is_out_of_memory(error))


def _try(work: Callable[[], object]) -> None:
    """Call `work` on a store that may be lost, and then does not answer."""

    def attempt() -> None:
        with suppress(Exception):
            work()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_GRACE)


def _wait(until: Callable[[], bool], seconds: float = _GRACE) -> None:
    """Wait until a condition is true, or for `seconds`."""
    deadline = time.monotonic() + seconds
    while not until() and time.monotonic() < deadline:
        time.sleep(0.02)
