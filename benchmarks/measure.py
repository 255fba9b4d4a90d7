"""What the benchmarks share: whole processes timed, their memory, and what ran where."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """One finished process: wall seconds, peak of its anonymous memory, what it printed."""

    seconds: float
    peak_anonymous_bytes: int
    output: str


def run_process(command: Sequence[str]) -> Run:
    """Run a command to its end, sampling its anonymous memory every 10 ms."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}")
    return Run(seconds, peak, output)


def anonymous_bytes(pid: int | str = "self") -> int:
    """Anonymous resident memory of a process: what it holds beyond mapped files."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def interleaved(
    commands: dict[str, Sequence[str]], runs: int, outputs: Sequence[Path]
) -> dict[str, list[Run]]:
    """Each command `runs` times in turn, A B C A B C, after one warm-up of each.

    `outputs` of earlier runs are removed before each, outside the measured time.
    """
    results: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(runs + 1):
        for name, command in commands.items():
            for path in outputs:
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)
            os.sync()
            results[name].append(run_process(command))
    return {name: measured[1:] for name, measured in results.items()}


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def environment(*packages: str) -> dict[str, str]:
    """Machine and versions, to stand beside the figures."""
    found = {"python": platform.python_version(), "machine": _processor()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def report(title: str, rows: Sequence[dict[str, object]], env: dict[str, str]) -> None:
    """Print results as JSON lines under a title."""
    sys.stdout.write(f"{title}\n{json.dumps(env)}\n")
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.processor()
