"""One for all: where a process of a pod ends, all end, each with one line and within a minute.

What can happen, and how the others hear of it:

- a process fails, or is interrupted: it says so on the board, and waits until it is heard;
- a process dies or is silent: the coordination service misses its heartbeats, and a thread of each
  other process asks for them; where a program breaks because of it, a roll call finds it sooner;
- process 0 dies, and the service with it: the runtime aborts, which a handler hears.

A main thread that is waiting unwinds; one that is stuck in a program is ended from outside.
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
from recall_jax.parallel.runtime import Runtime, catch_abort, hide_chatter

ADVICE = "what is done is kept: start all processes again with --resume to go on"

_LOOK = 0.25  # seconds between two looks at the board
_ROLL_CALL = 4.0  # seconds in which a living process answers
_GRACE = 3.0  # seconds for a main thread to unwind, and for the others to hear of an end

_ENDED, _SEEN, _CALL, _HERE = "watch/ended", "watch/seen", "watch/call", "watch/here"
_SIGNALS = {129: "was hung up", 130: "was interrupted", 143: "was terminated"}


@dataclass(frozen=True)
class Ending:
    """That a run is over because of one process, in words for the others."""

    process: int
    line: str

    def error(self) -> UnfinishedError:
        """To be raised in the other processes, in which nothing is wrong with what is done.

        Even where that one's input is: it may be its machine's alone, as a disk not mounted.
        """
        return UnfinishedError(self.line)


@contextmanager
def joined(
    *, advice: str = ADVICE, debug: bool = False, timeout: int = CONNECT_TIMEOUT
) -> Iterator[Processes]:
    """The processes of this run, connected, until all of them have ended their blocks.

    If the block of one fails, or a process is lost, the blocks of the others raise UnfinishedError
    with one line that names it; where they cannot, being stuck in a program, the line is printed
    and the process ends with status 2. `advice` is for work that can go on. Once in a process; what
    the runtime prints is hidden from then on, unless `debug`.
    Raises InputError where the processes do not find each other, as `connect`.
    """
    runtime = Runtime(2) if debug else hide_chatter()
    connecting = _Connecting(runtime)
    catch_abort(connecting.heard)
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
            watch.tell(error)
            raise
        told = ending.error()
        if advice not in ending.line:
            for note in getattr(error, "__notes__", ()):
                told.add_note(note)
        raise told from (error if debug else None)
    watch.leave()
    # Process 0 has the board: it goes last.
    _try(lambda: processes.publish(f"left/{processes.index}", None))
    if processes.index == 0:
        _wait(lambda: len(processes.board.under("recall/left")) == processes.count)


def _agree(processes: Processes) -> None:
    """Raise InputError where process 0 was told of another number of processes."""
    count = processes.broadcast("count", lambda: processes.count)
    if count != processes.count:
        raise InputError(
            f"process {processes.index} was started as one of {processes.count}, process 0 as one "
            f"of {count}: set {NUMBER} to the same for all"
        )


class _Connecting:
    """Who hears of an abort: the watch, once there is one."""

    def __init__(self, runtime: Runtime) -> None:
        self.watch: _Watch | None = None
        self._runtime = runtime
        self._why: str | None = None

    def heard(self) -> None:
        """In the thread that aborts."""
        if self.watch is None:
            self._why = self._runtime.last_words()
        else:
            self.watch.heard_abort()

    def failed(self) -> str | None:
        """Why the runtime has aborted, if it has."""
        return self._why


class _Watch:
    """Threads that look after the other processes."""

    def __init__(self, processes: Processes, runtime: Runtime, advice: str) -> None:
        self._processes, self._board = processes, processes.board
        self._runtime, self._advice = runtime, advice
        self._lock = threading.Lock()
        self._left = False  # the main thread has: no other thread may end the process any more
        self.ending: Ending | None = None

    def start(self) -> None:
        """Both threads; they end with the process."""
        for work in (self._look, self._count):
            threading.Thread(target=work, daemon=True).start()

    def check(self) -> None:
        """Raise where another process has ended."""
        if self.ending is not None:
            raise self.ending.error()

    def leave(self) -> None:
        """From here on the main thread speaks for itself."""
        with self._lock:
            self._left = True
        if self.ending is not None:
            self._wait_for_others(self.ending.process)

    def ending_behind(self, error: BaseException) -> Ending | None:
        """What other process is behind an error of this one, if any is.

        A program that breaks tells only that one of the others is gone: they are called. A signal
        to this process is its own, though all may have got it.
        """
        if not isinstance(error, Exception):
            return None
        if self.ending is None and _is_broken_program(error):
            try:
                self._call_the_roll()
            except Exception:  # the board is gone: an abort is to come, and says so
                _wait(lambda: self.ending is not None, HEARTBEAT_TIMEOUT + _GRACE)
        return self.ending

    def tell(self, error: BaseException) -> None:
        """Let the others know of an end of our own, and wait until they do."""
        index = self._processes.index
        ending = Ending(index, self._in_words(error))
        _try(lambda: self._board.put(_ENDED, json.dumps(asdict(ending))))
        self._wait_for_others(index)

    def heard_abort(self) -> None:
        """In the thread that aborts; the board does not answer any more, nor ever return."""
        with self._lock:
            if self._left:
                return
            index = self._processes.index
            if index and self._runtime.has_lost_service():
                line = self._lost(0).line
            else:
                line = f"{self._name(index)} crashed: {self._runtime.last_words()}: {self._advice}"
            self._speak((self.ending and self.ending.line) or line)

    def _look(self) -> None:
        """At the board, for the end of another process, and for a roll call."""
        here = f"{_HERE}/{self._processes.index}"
        answered = False
        while not self._left:
            with suppress(Exception):  # the service is gone: the abort is on its way
                if text := self._board.get(_ENDED):
                    self._end(Ending(**json.loads(text)))
                    return
                if not answered and self._board.get(_CALL) is not None:
                    answered = self._board.put(here, "")
            time.sleep(_LOOK)

    def _count(self) -> None:
        """Those whose heartbeats are missed."""
        everyone = set(range(self._processes.count))
        while not self._left:
            with suppress(Exception):
                if lost := everyone - self._board.alive():
                    self._find(self._lost(min(lost)))
            time.sleep(1)

    def _find(self, ending: Ending) -> None:
        """Say on the board what was found here, unless something has been said before."""
        with suppress(Exception):
            self._board.put(_ENDED, json.dumps(asdict(ending)))
            if text := self._board.get(_ENDED):
                ending = Ending(**json.loads(text))
        self.ending = self.ending or ending

    def _end(self, ending: Ending) -> None:
        """The run is over: let the main thread unwind, or end it."""
        self.ending = self.ending or ending
        with suppress(Exception):
            self._board.put(f"{_SEEN}/{self._processes.index}", "")
        _wait(lambda: self._left)
        with self._lock:
            if self._left:
                return
            self._wait_for_others(self.ending.process)
            self._speak(self.ending.line)

    def _speak(self, line: str) -> NoReturn:
        """For a main thread that cannot."""
        self._runtime.say(f"recall: {line}")
        os._exit(2)

    def _wait_for_others(self, ended: int) -> None:
        """In process 0, until the others have seen why: the board goes with it."""
        if self._processes.index:
            return
        others = self._processes.count - 1 - (ended != 0)
        with suppress(Exception):
            _wait(lambda: len(set(self._board.under(_SEEN)) - {"0", str(ended)}) >= others)

    def _call_the_roll(self) -> None:
        """Find who does not answer."""
        self._board.put(_CALL, "")
        others = set(range(self._processes.count)) - {self._processes.index}

        def missing() -> set[int]:
            return others - set(map(int, self._board.under(_HERE)))

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
    """Whether an input is wrong, so that nothing is worth keeping."""
    return isinstance(error, InputError) and not isinstance(error, UnfinishedError)


def _is_broken_program(error: BaseException) -> bool:
    """Whether the runtime may have failed, which it tells in errors of several kinds."""
    return not (isinstance(error, InputError | OSError) or is_out_of_memory(error))


def _try(work: Callable[[], object]) -> None:
    """Do something on the board that may be gone by now, and then does not answer."""

    def attempt() -> None:
        with suppress(Exception):
            work()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_GRACE)


def _wait(until: Callable[[], bool], seconds: float = _GRACE) -> None:
    """For something to become true, but no longer than that."""
    deadline = time.monotonic() + seconds
    while not until() and time.monotonic() < deadline:
        time.sleep(0.02)
