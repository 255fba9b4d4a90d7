"""The processes of a pod: how they find each other, and what they tell each other beside programs.

JAX's coordination service, which runs in process 0, holds short texts by key. Any thread may use
it while programs run; what is large, or an array, goes through programs instead.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from recall_jax.errors import InputError

# How long a process may be silent before it counts as lost. Shorter, a machine that swaps or is
# moved would be taken for dead; longer, the others wait for nothing.
HEARTBEAT_TIMEOUT = 20  # seconds
CONNECT_TIMEOUT = 300  # seconds until all processes of a pod have been started

ADDRESS, NUMBER, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

_PREFIX = "recall"
_CURE = (
    f"set {ADDRESS} (host:port of process 0, the same for all), {NUMBER} and {INDEX} (from 0), "
    "and start all processes at about the same time"
)


class Board(Protocol):
    """Texts by key, seen by all processes. A key is written once and then stands."""

    def put(self, key: str, text: str) -> bool:
        """Write; False, and nothing is changed, where the key is there already."""

    def get(self, key: str) -> str | None:
        """The text of a key, None where there is none yet."""

    def under(self, folder: str) -> dict[str, str]:
        """All texts whose keys start with `folder/`, by the rest of their keys."""

    def alive(self) -> set[int]:
        """The processes that live; waits for all of those to ask."""


class _OwnBoard:
    """The board of a single process, where what is written last stands: runs follow each other."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def put(self, key: str, text: str) -> bool:
        self._texts[key] = text
        return True

    def get(self, key: str) -> str | None:
        return self._texts.get(key)

    def under(self, folder: str) -> dict[str, str]:
        start, texts = f"{folder}/", list(self._texts.items())
        return {key.removeprefix(start): text for key, text in texts if key.startswith(start)}

    def alive(self) -> set[int]:
        return {0}


class _Service:
    """JAX's coordination service as a board.

    Its client is private to jax. There is no public way to it, nor another that needs no program
    and is open to any thread; jax's own libraries for many hosts, Orbax among them, use it so.
    """

    def __init__(self, count: int) -> None:
        from jax._src.distributed import global_state

        assert global_state.client is not None
        self._client, self._all = global_state.client, list(range(count))

    def put(self, key: str, text: str) -> bool:
        from jax.errors import JaxRuntimeError

        try:
            self._client.key_value_set(key, text)
        except JaxRuntimeError as error:
            if "ALREADY_EXISTS" in str(error):
                return False
            raise
        return True

    def get(self, key: str) -> str | None:
        from jax.errors import JaxRuntimeError

        try:
            text: str = self._client.key_value_try_get(key)
        except JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise
        return text

    def under(self, folder: str) -> dict[str, str]:
        texts = self._client.key_value_dir_get(folder)
        return {key.removeprefix(f"{folder}/"): text for key, text in texts}

    def alive(self) -> set[int]:
        return set(self._client.get_live_nodes(self._all))


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this is; by default the only one.

    Whatever waits goes on waiting until `check` raises, which it does once another process has
    ended. Values are JSON. Every key is written once in a run.
    """

    index: int = 0
    count: int = 1
    board: Board = field(default_factory=_OwnBoard, repr=False)
    check: Callable[[], None] = field(default=lambda: None, repr=False)

    def publish(self, key: str, value: Any) -> None:
        """Let all processes know a value."""
        if not self.board.put(f"{_PREFIX}/{key}", json.dumps(value)):
            raise ValueError(f"key {key!r} is published already")

    def wait(self, key: str) -> Any:
        """A value that some process publishes, as soon as it is there."""
        return json.loads(self._await(lambda: self.board.get(f"{_PREFIX}/{key}")))

    def broadcast(self, key: str, make: Callable[[], Any]) -> Any:
        """What process 0 makes, for all; as JSON gives it back, so that all have the same."""
        if self.count == 1:  # then a key may come again, as in a program of many merges
            return make()
        if self.index == 0:
            self.publish(key, make())
        return self.wait(key)

    def exchange(self, key: str, value: Any) -> list[Any]:
        """What every process gives, in their order, once all have given it."""
        if self.count == 1:
            return [value]
        self.publish(f"{key}/{self.index}", value)

        def all_of_them() -> dict[str, str] | None:
            texts = self.board.under(f"{_PREFIX}/{key}")
            return texts if len(texts) == self.count else None

        texts = self._await(all_of_them)
        return [json.loads(texts[str(index)]) for index in range(self.count)]

    def barrier(self, name: str) -> None:
        """Go on when all processes have come here."""
        self.exchange(name, None)

    def _await(self, look: Callable[[], Any]) -> Any:
        pause = 0.001
        while (found := look()) is None:
            self.check()
            time.sleep(pause)  # and here the main thread hears of signals
            pause = min(2 * pause, 0.05)
        return found


ALONE = Processes()


def connect(
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    timeout: int = CONNECT_TIMEOUT,
    failed: Callable[[], str | None] = lambda: None,
) -> Processes:
    """Join the other processes of this run; before anything of jax but its import.

    `address` is host:port of process 0. What is left out is taken from the environment
    (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), else from the cluster, where jax
    knows it: TPU pods, SLURM, Open MPI, Kubernetes. jax aborts where it cannot connect: `failed`
    says why, once a handler has caught that. Raises InputError where something is missing or
    wrong, or not all have come in `timeout` seconds.
    """
    import jax

    address = address or os.environ.get(ADDRESS)
    count = _number(NUMBER) if count is None else count
    index = _number(INDEX) if index is None else index
    _check(address, count, index)
    # A loss is then told by the board, so that it can be named, instead of by an abort; only
    # that of process 0, where the board is, still aborts.
    jax.config.update("jax_enable_recoverability", True)
    # Would take SIGTERM away from the command line.
    jax.config.update("jax_enable_preemption_service", False)
    # Programs that run side by side on the CPU could start their collectives in another order in
    # each process.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    began = time.monotonic()
    if address is not None and index is not None:
        _reach(address, index, timeout)
    left = max(int(timeout - (time.monotonic() - began)), 1)
    errors: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                address,
                count,
                index,
                initialization_timeout=left,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            )
        except Exception as error:
            errors.append(error)

    joining = threading.Thread(target=join, daemon=True)  # the main thread hears of signals
    joining.start()
    while joining.is_alive() and failed() is None:
        joining.join(0.05)
    if (why := failed()) is not None:
        where = f" at {address}" if address else ""
        raise InputError(
            f"the processes did not find each other{where} within {timeout} s ({why}): {_CURE}"
        )
    if errors:
        why = " ".join(str(errors[0]).split())
        raise InputError(f"the processes cannot be connected: {why}: {_CURE}") from errors[0]
    from jax._src.distributed import global_state

    index, count = global_state.process_id, global_state.num_processes
    return Processes(index, count, _Service(count))


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise InputError(f"{name} is {text!r}, which is no number: {_CURE}")
    return int(text)


def _check(address: str | None, count: int | None, index: int | None) -> None:
    if count is not None and count < 1:
        raise InputError(f"{count} processes cannot run: {_CURE}")
    if index is not None and count is not None and not 0 <= index < count:
        raise InputError(f"there is no process {index} of {count}: {_CURE}")
    if address is not None and not _port(address):
        raise InputError(f"{address!r} is not of the form host:port: {_CURE}")
    given = {ADDRESS: address, NUMBER: count, INDEX: index}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given) and not _in_cluster():
        verb = "is" if len(missing) == 1 else "are"
        raise InputError(f"{' and '.join(missing)} {verb} not set: {_CURE}")
    if len(missing) == len(given) and not _in_cluster():
        raise InputError(f"no cluster that jax knows was found here: {_CURE}")


def _in_cluster() -> bool:
    """Whether jax can find out by itself which processes there are."""
    from jax._src.clusters import ClusterEnv

    return any(
        cluster.is_env_present()
        for cluster in ClusterEnv._cluster_types
        if not cluster.opt_in_only_method
    )


def _port(address: str) -> int:
    """0 where there is none."""
    host, _, port = address.rpartition(":")
    return int(port) if host and port.isdecimal() and int(port) < 1 << 16 else 0


def _reach(address: str, index: int, timeout: int) -> None:
    """Find out what would crash jax: a port that is taken, or a process 0 that is not there."""
    port = _port(address)
    if index == 0:
        try:
            socket.create_server(("", port)).close()
        except OSError as error:
            raise InputError(
                f"process 0 cannot listen at port {port}: {error.strerror}: choose another port "
                f"in {ADDRESS}"
            ) from error
        return
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address.rpartition(":")[0].strip("[]"), port), 5).close()
        except OSError as error:
            if time.monotonic() > until:
                raise InputError(
                    f"process 0 does not answer at {address} within {timeout} s "
                    f"({error.strerror or error}): {_CURE}"
                ) from error
            time.sleep(0.1)
        else:
            return
