"""The memory budget of a run: what is free, and how large the pieces of a merge may be.

The budget is of the memory that runs the models: the host's on CPU, each device's elsewhere. Maps
of checkpoint files do not count: the system takes their pages back when it needs them.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import jax

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.engine.chunks import CHUNK
from recall_jax.engine.plan import units_of
from recall_jax.errors import InputError

SHARE = 0.6  # of what is free
_COMPILER = 200 << 20  # what compiling and its programs take beside the arrays
_SMALLEST_CHUNK = 1 << 14
MIB = 1 << 20


def memory_budget(asked: int | None) -> int:
    """Bytes that a run may take: as asked, or a share of what is free."""
    return int(SHARE * free_bytes()) if asked is None else asked


def free_bytes() -> int:
    """Free memory of the host, within this process's limits; on accelerators of a device."""
    if jax.default_backend() != "cpu":
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        known = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if "bytes_limit" in s]
        if known:
            return min(known)
    return min([_free_on_host(), *_limits()])


def taken_bytes() -> int:
    """Anonymous memory that this process holds already, and will need to compile."""
    if jax.default_backend() != "cpu":
        return 0
    return _field("/proc/self/status", "RssAnon") + _COMPILER


def cut_pieces(models: Sequence[Checkpoint], backlog: int, budget: int) -> tuple[int, int]:
    """The largest pieces to merge in, up to CHUNK elements, and the bytes that merging needs.

    `backlog` merged pieces exist at once. Raises InputError where even the smallest do not fit.
    """
    folded = sum(2 * _largest_unit(model) for model in models if model.adapters)
    chunk = CHUNK
    while True:
        needed = taken_bytes() + folded + (backlog + 2) * (len(models) + 1) * chunk * 4
        if needed <= budget:
            return chunk, needed
        if chunk <= _SMALLEST_CHUNK:
            raise InputError(
                f"this merge needs {needed / MIB:,.0f} MiB of memory and may take "
                f"{budget / MIB:,.0f} MiB: allow more with --memory"
            )
        chunk //= 4


def _largest_unit(model: Checkpoint) -> int:
    """Bytes of a model's largest unit: adapters are folded into memory a unit at a time."""
    return max(
        sum(model.specs[name].nbytes for name in names) for names in units_of(model.specs).values()
    )


def _free_on_host() -> int:
    if available := _field("/proc/meminfo", "MemAvailable"):
        return available
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _limits() -> list[int]:
    """What a container and `ulimit -d` leave to this process."""
    import resource

    left = []
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        left.append(soft - _field("/proc/self/status", "VmData"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            left.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no such container here
    return [max(each, 0) for each in left]


def _field(path: str, name: str) -> int:
    """Bytes that a file of /proc gives in kB under a name; 0 where it does not exist."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)
