"""Describe the machine of a run: processor, device, package versions, memory."""

import os
import platform
import resource
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute a result, by name."""
    packages = ("recall-jax", "jax", "jaxlib", "flax", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def device() -> str:
    """Return JAX's name for the kind of device that runs the models."""
    return jax.devices()[0].device_kind


def processor() -> str:
    """Return the processor's name, as the system gives it, and its number of cores."""
    name = platform.processor() or platform.machine()
    table = Path("/proc/cpuinfo")
    if table.exists():
        lines = [line.partition(":") for line in table.read_text(encoding="utf-8").splitlines()]
        name = next((value.strip() for key, _, value in lines if "model name" in key), name)
    return f"{name}, {os.cpu_count()} cores"


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process in bytes, mapped input files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
