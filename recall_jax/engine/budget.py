"""Set the memory budget of a run, and fit the chunk size of a merge to it.

The budget limits all memory that this process holds where the models run: host memory on CPU, the
memory of each device elsewhere. Memory-mapped checkpoint files do not count, since the system can
reclaim their pages at any time.
"""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import jax

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.engine.chunks import CHUNK
from recall_jax.engine.needs import NO_NEEDS, Needs
from recall_jax.engine.plan import full_tensor_names, units_of
from recall_jax.errors import UnfinishedError

SHARE = 0.6  # of the free memory
MIB = 1 << 20
_COMPILATION_BYTES = 32 * MIB  # for the merge: 26 MiB measured
_COMPILATION_BY_SHAPE_BYTES = 48 * MIB  # more, for full tensors: 65 MiB in all measured
_LEAST_ROWS_BYTES = 8 * MIB  # if even this is too much, the plan of the run raises
_FLOAT32 = 4
_SMALLEST_CHUNK = 1 << 14
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def memory_budget(requested: int | None, *, neighbours: int = 1) -> int:
    """Return the memory budget in bytes: `requested`, or the memory held and a share of the free.

    `neighbours` is the number of processes on this host that share its memory.
    """
    if requested is not None:
        return requested
    together = neighbours if jax.default_backend() == "cpu" else 1
    return held_bytes() + int(SHARE * free_bytes() / together)


def free_bytes() -> int:
    """Return the free bytes within this process's limits: of the host, or of the fullest device."""
    if jax.default_backend() != "cpu":
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        known = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if "bytes_limit" in s]
        if known:
            return min(known)
    return _free_on_host()


def cacheable_bytes(budget: int) -> int:
    """Return how many bytes of the models' files the host can keep in memory within the budget."""
    if jax.default_backend() == "cpu":
        return budget
    return int(SHARE * _free_on_host())


def machine_bytes() -> int:
    """Return the total memory of this machine in bytes, free or not."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def room_for_rows(budget: int) -> int:
    """Return how many bytes of host memory the rows of a data file may take within the budget."""
    return max(cacheable_bytes(budget) - held_bytes(), _LEAST_ROWS_BYTES)


def held_bytes() -> int:
    """Return the anonymous memory that this process holds now, in bytes; 0 on accelerators."""
    if jax.default_backend() != "cpu":
        return 0
    return _field("/proc/self/status", "RssAnon")


def fit_chunk_size(
    models: Sequence[Checkpoint],
    merged: Mapping[str, TensorSpec],
    backlog: int,
    budget: int,
    *,
    needs: Needs = NO_NEEDS,
) -> tuple[int | None, int]:
    """Return the largest chunk size that fits, at most CHUNK elements, and the overhead of merging.

    The overhead is the number of bytes that merging adds to `held_bytes`. `backlog` chunks of
    `merged` tensors wait to be written, one is computed and one is handed over. The chunk size is
    None if the method needs all tensors in full. For a full tensor, the kernel's scratch arrays in
    float32 count for each of `models`, which are all models that are read.

    Raises UnfinishedError if not even the smallest chunk size fits.
    """
    element = sum(widest(specs) for specs in (merged, *(model.specs for model in models)))
    full = full_tensor_names(needs.full_tensors, merged)
    largest = max((math.prod(merged[name].shape) for name in full), default=0)
    work = _FLOAT32 * needs.scratch * len(models)
    fixed = _COMPILATION_BYTES + folded_bytes(models)
    if full:
        fixed += _COMPILATION_BY_SHAPE_BYTES
        fixed += largest * (work + (backlog + 2) * widest(merged))
    if len(full) == len(merged):
        if (needed := held_bytes() + fixed) > budget:
            raise _too_large(needed, budget)
        return None, fixed
    chunk = CHUNK
    while True:
        added = fixed + (backlog + 2) * chunk * element
        if (needed := held_bytes() + added) <= budget:
            return chunk, added
        if chunk <= _SMALLEST_CHUNK:
            raise _too_large(needed, budget)
        chunk //= 4


def _too_large(needed: int, budget: int) -> UnfinishedError:
    return UnfinishedError(
        f"this merge needs {needed / MIB:,.0f} MiB of memory and may take "
        f"{budget / MIB:,.0f} MiB: allow more (--memory)"
    )


def folded_bytes(models: Sequence[Checkpoint]) -> int:
    """Return the bytes that folding adapters takes.

    Adapters are folded one unit at a time, while the unit before is in use and another is released.
    """
    units = tensors = 0
    for model in models:
        if model.adapters:
            units += 3 * max(
                sum(model.specs[name].nbytes for name in names)
                for names in units_of(model.specs).values()
            )
            tensors = max(tensors, *(4 * math.prod(spec.shape) for spec in model.specs.values()))
    return units + 3 * tensors  # base weights, the update and its square, in float32


def widest(specs: Mapping[str, TensorSpec]) -> int:
    """Return the item size in bytes of the widest dtype among the tensors."""
    return max(spec.dtype.itemsize for spec in specs.values())


def _free_on_host() -> int:
    """Return the available memory of the machine, within this process's limits."""
    available = _field("/proc/meminfo", "MemAvailable")
    return min([available or machine_bytes() // 2, *_limits()])


def _limits() -> list[int]:
    """Return the bytes left by each limit on this process: control groups and `ulimit -d`."""
    import resource

    left = []
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        left.append(soft - _field("/proc/self/status", "VmData"))
    innermost = _CONTROL_GROUPS / _control_group().lstrip("/")
    for group in (innermost, *innermost.parents):  # limits of parent groups apply too
        with suppress(OSError, ValueError):  # unlimited
            limit = int((group / "memory.max").read_text())
            taken = int((group / "memory.current").read_text())
            left.append(limit - taken + _cached_files(group))
    return [max(each, 0) for each in left]


def _control_group() -> str:
    """Return the path of this process's control group (cgroup v2) below the root group."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return "/"
    return next((line[3:] for line in lines if line.startswith("0::")), "/")


def _cached_files(group: Path) -> int:
    """Return the bytes of cached files that a control group counts as used, but can reclaim."""
    lines = (group / "memory.stat").read_text().splitlines()
    stat = dict(line.split() for line in lines)
    return int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))


def _field(path: str, name: str) -> int:
    """Return the bytes given in kB under `name` in a file of /proc, 0 if there is no such file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)
