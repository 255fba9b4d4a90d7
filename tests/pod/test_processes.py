"""Real processes on the loopback: what they tell each other, and how all end when one does."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from recall_jax.errors import InputError
from recall_jax.parallel.processes import ALONE, Processes, connect

PROLOGUE = """
import os, signal, sys, time
import jax
from recall_jax.cli import signals
from recall_jax.cli.main import _run, app
from recall_jax.errors import InputError
from recall_jax.parallel import processes as pod_processes
from recall_jax.parallel import watch
pod_processes.HEARTBEAT_TIMEOUT = 6

def said(name):
    (sys.stdout.write(name + chr(10)), sys.stdout.flush())

def total(processes):
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    row = np.arange(float(jax.device_count()), dtype=np.float32)
    array = jax.make_array_from_callback(row.shape, sharding, lambda index: row[index])
    replicated = NamedSharding(mesh, PartitionSpec())
    summed = jax.jit(lambda a: a.sum(), out_shardings=replicated)
    return lambda: float(summed(array))

def command():
    signals.begin()
    with watch.joined(timeout=int(os.environ.get("WAIT", "60"))) as processes:
        work(processes)
    said("over")

app.command("work-together")(command)
"""
EPILOGUE = """
signals.catch()
status = _run(["work-together"])
if os.environ.get("TAKE_APART"):
    sys.exit(status)
os._exit(status)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Pod:
    """The same program in several processes."""

    def __init__(self, program: str, count: int = 2, **environment: str) -> None:
        numbers = environment.pop("NUMBERS", f"{count} " * count).split()
        source = PROLOGUE + textwrap.dedent(program) + EPILOGUE
        shared = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", source],
                env={
                    **os.environ,
                    **shared,
                    "JAX_NUM_PROCESSES": numbers[index],
                    "JAX_PROCESS_ID": str(index),
                    **environment,
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]

    def wait_for(self, index: int, line: str) -> None:
        assert self.processes[index].stdout.readline() == f"{line}\n"

    def end(self, index: int, seconds: float = 50) -> tuple[int, str, str]:
        """Status, stdout and stderr."""
        out, err = self.processes[index].communicate(timeout=seconds)
        return self.processes[index].returncode, out, err


@pytest.fixture
def start():
    pods = []

    def begin(*arguments, **environment):
        pods.append(Pod(*arguments, **environment))
        return pods[-1]

    yield begin
    for pod in pods:
        for process in pod.processes:
            process.kill()
            with process:  # waits, and closes its pipes
                pass


LOST = "recall: process {} of 2 was lost: what is done is kept: start all processes again with --resume to go on\n"  # noqa: E501
STUCK = """
def work(processes):
    step = total(processes)
    step()
    said("up")
    while True:
        step()
"""
WAITING = """
def work(processes):
    processes.barrier("here")
    said("up")
    processes.wait("what nobody publishes")
"""


@pytest.mark.parametrize("taken_apart", ["", "yes"])
def test_processes_talk_compute_and_end_without_a_word(start, taken_apart):
    pod = start(
        """
        def work(processes):
            processes.publish(f"from/{processes.index}", {"x": [processes.index, None]})
            assert processes.wait(f"from/{1 - processes.index}") == {"x": [1 - processes.index, None]}
            made = processes.broadcast("made", lambda: "x" * 6_000_000 + str(processes.index))
            assert made == "x" * 6_000_000 + "0"
            assert processes.exchange("all", processes.index) == [0, 1]
            try:
                processes.publish("made", 1)
            except ValueError as error:
                assert "published already" in str(error)
            else:
                raise AssertionError
            assert total(processes)() == 6
            print("chatter that is ours")
            if processes.index == 1:
                os.write(1, b"chatter of the runtime")
                os.write(2, b"chatter of the runtime")
                time.sleep(0.5)
        """,  # noqa: E501
        TAKE_APART=taken_apart,
    )
    for index in (0, 1):
        assert pod.end(index) == (0, "chatter that is ours\nover\n", "")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_one_in_a_program(start, lost):
    pod = start(STUCK)
    for index in (0, 1):
        pod.wait_for(index, "up")
    began = time.monotonic()
    pod.processes[lost].kill()
    assert pod.end(1 - lost) == (2, "", LOST.format(lost))
    assert time.monotonic() - began < 40


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_one_that_waits(start, lost):
    pod = start(WAITING)
    for index in (0, 1):
        pod.wait_for(index, "up")
    began = time.monotonic()
    pod.processes[lost].kill()
    assert pod.end(1 - lost) == (2, "", LOST.format(lost))
    assert time.monotonic() - began < 40


@pytest.mark.soak
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("program", [STUCK, WAITING])
def test_a_stopped_process_ends_the_other(start, lost, program):
    pod = start(program)
    for index in (0, 1):
        pod.wait_for(index, "up")
    pod.processes[lost].send_signal(signal.SIGSTOP)
    assert pod.end(1 - lost) == (2, "", LOST.format(lost))


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_of_one_is_told_by_all(start, failing):
    pod = start(
        f"""
        def work(processes):
            step = total(processes)
            step()
            said("up")
            if processes.index == {failing}:
                raise InputError("tensor t is\\nnot finite")
            if processes.index == 1:
                processes.wait("what nobody publishes")
            while True:
                step()
        """,
        3,
    )
    line = f"recall: process {failing} of 3 ended: tensor t is not finite\n"
    for index in range(3):
        own = "recall: tensor t is not finite\n"
        assert pod.end(index) == (2, "up\n", own if index == failing else line)


def test_a_signal_to_one_ends_all(start):
    pod = start(WAITING)
    for index in (0, 1):
        pod.wait_for(index, "up")
    pod.processes[1].send_signal(signal.SIGTERM)
    assert pod.end(1) == (143, "", "recall: terminated\n")
    line = LOST.format(1).replace("was lost", "was terminated")
    assert pod.end(0) == (2, "", line)


def test_a_crash_of_the_runtime_is_not_taken_for_a_loss(start):
    pod = start(
        """
        def work(processes):
            processes.barrier("here")
            if processes.index == 0:
                os.write(2, b"F0000 device.cc:1] Check failed: the device is on fire" + b"\\n")
                os.abort()
            processes.wait("what nobody publishes")
        """
    )
    advice = LOST.partition(" was lost")[2]
    crash = "process 0 of 2 crashed: F0000 device.cc:1] Check failed: the device is on fire"
    assert pod.end(0) == (2, "", f"recall: {crash}{advice}")
    assert pod.end(1) == (2, "", LOST.format(0))


def test_processes_that_do_not_come_are_named_in_time(start):
    pods = [start("work = None", 2, WAIT="2") for _ in range(2)]
    said = [
        "the processes did not find each other at 127.0.0.1",
        "process 0 does not answer at 127.0.0.1",
    ]
    for index, pod in enumerate(pods):
        pod.processes[1 - index].kill()
    for index, pod in enumerate(pods):
        status, out, err = pod.end(index)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"recall: {said[index]}")
        assert "JAX_NUM_PROCESSES" in err


def test_numbers_of_processes_that_differ_are_named(start):
    pod = start("def work(processes):\n    processes.barrier('here')", 2, NUMBERS="2 3")
    status, out, err = pod.end(1)
    fault = "process 1 was started as one of 3, process 0 as one of 2: set JAX_NUM_PROCESSES"
    assert (status, out) == (2, "")
    assert err.startswith(f"recall: {fault}")
    status, out, err = pod.end(0)
    assert (status, out) == (2, "")
    assert err.startswith(f"recall: process 1 of 3 ended: {fault}")


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen at port {port}: .*another port"):
            connect(f"127.0.0.1:{port}", 2, 0)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ((None, None, None), "no cluster that jax knows"),
        (("host:1", 2, None), "JAX_PROCESS_ID is not set"),
        ((None, 2, 0), "JAX_COORDINATOR_ADDRESS is not set"),
        (("host", 2, 0), "'host' is not of the form host:port"),
        (("host:1", 2, 2), "there is no process 2 of 2"),
        (("host:1", 0, 0), "0 processes cannot run"),
    ],
)
def test_addresses_that_are_missing_or_wrong(arguments, fault, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=fault):
        connect(*arguments)


def test_a_number_in_the_environment_that_is_none(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(InputError, match="JAX_PROCESS_ID is 'one', which is no number"):
        connect("host:1", 2)


def test_one_process_is_its_own_company():
    for value in (1, 2):  # one run after the other
        ALONE.publish("a", (value, 2))
        assert ALONE.wait("a") == [value, 2]
        assert ALONE.broadcast("b", lambda made=value: {"k": made}) == {"k": value}
        assert ALONE.exchange("c", value) == [value]
        ALONE.barrier("d")


def test_whoever_waits_stops_when_another_has_ended():
    def check() -> None:
        raise InputError("process 1 of 2 ended")

    with pytest.raises(InputError, match="process 1 of 2 ended"):
        Processes(0, 2, check=check).barrier("together")
