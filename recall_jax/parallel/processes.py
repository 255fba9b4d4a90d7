"""Connect the processes of a pod, and exchange small values outside of programs.

JAX's coordination service, which runs in process 0, stores short texts by key. Any thread may use
it while programs run; large values and arrays are exchanged by programs instead.
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

# How long a process may be silent before it counts as lost. If shorter, a machine that swaps or
# migrates would count as dead; if longer, the others would wait in vain.
HEARTBEAT_TIMEOUT = 20  # seconds
CONNECT_TIMEOUT = 300  # seconds until all processes of a pod have been started

ADDRESS, NUMBER, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

_PREFIX = "recall"
_CURE = (
    f"set {ADDRESS} (host:port of process 0, the same for all), {NUMBER} and {INDEX} (from 0), "
    "and start all processes at about the same time"
)


class KeyValueStore(Protocol):
    """Store texts by key, visible to all processes. A key is written once."""

    def put(self, key: str, text: str) -> bool:
        """Write a text; return False, without a change, if the key exists already."""

    def get(self, key: str) -> str | None:
        """Return the text of a key, or None if it does not exist yet."""

    def under(self, folder: str) -> dict[str, str]:
        """Return all texts whose keys start with `folder/`, by the rest of their keys."""

    def alive(self) -> set[int]:
        """Return the processes that are alive; waits until all of those have called it."""


class _LocalStore:
    """Store the texts of a single process.

    A key may be written again, as runs follow each other.
    """

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


class _CoordinationStore:
    """Store texts in JAX's coordination service.

    Its client is private to jax. There is no public access to it, and no alternative that needs no
    program and can be used from any thread; jax's libraries for several hosts, Orbax among them,
    use it in the same way.
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
    """Represent the processes of a run, and which of them this is; by default the only one.

    Every wait continues until `check` raises, which it does once another process has ended. Values
    are JSON. Every key is written once in a run.
    """

    index: int = 0
    count: int = 1
    store: KeyValueStore = field(default_factory=_LocalStore, repr=False)
    check: Callable[[], None] = field(default=lambda: None, repr=False)

    def publish(self, key: str, value: Any) -> None:
        """Make a value known to all processes; ValueError if the key is published already."""
        if not self.store.put(f"{_PREFIX}/{key}", json.dumps(value)):
            raise ValueError(f"key {key!r} is published already")

    def wait(self, key: str) -> Any:
        """Wait for a value that some process publishes, and return it."""
        return json.loads(self._await(lambda: self.store.get(f"{_PREFIX}/{key}")))

    def broadcast(self, key: str, make: Callable[[], Any]) -> Any:
        """Return the value that process 0 makes; all processes get it as read back from JSON."""
        if self.count == 1:  # a key may then be used again, as in a program of many merges
            return make()
        if self.index == 0:
            self.publish(key, make())
        return self.wait(key)

    def exchange(self, key: str, value: Any) -> list[Any]:
        """Return the values of all processes, in their order, once all have given theirs."""
        if self.count == 1:
            return [value]
        self.publish(f"{key}/{self.index}", value)

        def all_of_them() -> dict[str, str] | None:
            texts = self.store.under(f"{_PREFIX}/{key}")
            return texts if len(texts) == self.count else None

        texts = self._await(all_of_them)
        return [json.loads(texts[str(index)]) for index in range(self.count)]

    def barrier(self, name: str) -> None:
        """Wait until all processes have reached this call."""
        self.exchange(name, None)

    def _await(self, read: Callable[[], Any]) -> Any:
        pause = 0.001
        while (found := read()) is None:
            self.check()
            time.sleep(pause)  # the main thread handles signals here
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
    """Connect to the other processes of this run; call it before using jax other than by import.

    `address` is host:port of process 0. Omitted arguments are taken from the environment
    (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), else from the cluster if jax
    recognizes it: TPU pods, SLURM, Open MPI, Kubernetes. jax aborts if it cannot connect: `failed`
    returns the reason, once a handler has caught the abort. Raises InputError if something is
    missing or wrong, or not all processes have connected in `timeout` seconds.
    """
    import jax

    address = address or os.environ.get(ADDRESS)
    count = _number(NUMBER) if count is None else count
    index = _number(INDEX) if index is None else index
    _check(address, count, index)
    # A lost process is then reported by the store, so that we can name it, instead of by an abort.
    # Only the loss of process 0, which has the store, still aborts.
    jax.config.update("jax_enable_recoverability", True)
    # It would handle SIGTERM in place of the command line.
    jax.config.update("jax_enable_preemption_service", False)
    # Programs that run concurrently on the CPU could start their collectives in a different order
    # in each process.
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

    joining = threading.Thread(target=join, daemon=True)  # the main thread handles signals
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
    return Processes(index, count, _CoordinationStore(count))


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
    """Return whether jax can detect the processes by itself."""
    from jax._src.clusters import ClusterEnv

    return any(
        cluster.is_env_present()
        for cluster in ClusterEnv._cluster_types
        if not cluster.opt_in_only_method
    )


def _port(address: str) -> int:
    """Return the port of host:port, or 0 if there is none."""
    host, _, port = address.rpartition(":")
    return int(port) if host and port.isdecimal() and int(port) < 1 << 16 else 0


def _reach(address: str, index: int, timeout: int) -> None:
    """Detect what would crash jax: a port in use, or a process 0 that does not answer."""
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
