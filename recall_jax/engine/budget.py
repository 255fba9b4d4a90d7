"""The memory budget of a run: what is free, and how large the pieces of a merge may be.

The budget is of the memory that runs the models, and is all that this process may hold of it: the
host's on CPU, each device's elsewhere. Maps of checkpoint files do not count: the system takes
their pages back when it needs them.
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

SHARE = 0.6  # of what is free
MIB = 1 << 20
_PROGRAMS = 32 * MIB  # what compiling the merge takes: 26 MiB measured
_ROOM = 8 * MIB  # for rows, at least: where that is too much, the plan of the run says so
_FLOAT32 = 4
_SMALLEST_CHUNK = 1 << 14
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def memory_budget(asked: int | None, *, neighbours: int = 1) -> int:
    """Bytes that a run may hold: as asked, or what it holds by now and a share of what is free.

    Where `neighbours` processes run together on this host, its memory is for all of them.
    """
    if asked is not None:
        return asked
    together = neighbours if jax.default_backend() == "cpu" else 1
    return held_bytes() + int(SHARE * free_bytes() / together)


def free_bytes() -> int:
    """Free memory of the host, within this process's limits; on accelerators of a device."""
    if jax.default_backend() != "cpu":
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        known = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if "bytes_limit" in s]
        if known:
            return min(known)
    return _free_on_host()


def cacheable_bytes(budget: int) -> int:
    """How much of the models' files the host can keep in memory, within a run's budget."""
    if jax.default_backend() == "cpu":
        return budget
    return int(SHARE * _free_on_host())


def machine_bytes() -> int:
    """All memory of this machine, whatever of it is free."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def room_for_rows(budget: int) -> int:
    """Bytes of the host's memory that rows of data may take within a run's budget."""
    return max(cacheable_bytes(budget) - held_bytes(), _ROOM)


def held_bytes() -> int:
    """Anonymous memory that this process holds by now."""
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
    """The largest pieces to merge in, up to CHUNK elements, and the bytes merging adds to `held`.

    `backlog` pieces of the `merged` tensors exist at once, beside one in work and one handed over.
    Tensors that the method `needs` in full are not chunked (None where these are all),
    and what a kernel makes of one in work is float32, for each of the models, which are all that is
    read.
    Raises UnfinishedError where even the smallest do not fit.
    """
    element = sum(widest(specs) for specs in (merged, *(model.specs for model in models)))
    full = full_tensor_names(needs.full_tensors, merged)
    largest = max((math.prod(merged[name].shape) for name in full), default=0)
    work = _FLOAT32 * needs.scratch * len(models)
    fixed = _PROGRAMS + folded_bytes(models) + largest * (work + (backlog + 2) * widest(merged))
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
    """What adapters take: they are folded a unit at a time, while one is in use and one let go."""
    units = tensors = 0
    for model in models:
        if model.adapters:
            units += 3 * max(
                sum(model.specs[name].nbytes for name in names)
                for names in units_of(model.specs).values()
            )
            tensors = max(tensors, *(4 * math.prod(spec.shape) for spec in model.specs.values()))
    return units + 3 * tensors  # the base's, the update and its square, in float32


def widest(specs: Mapping[str, TensorSpec]) -> int:
    """Bytes of an element of the widest tensor."""
    return max(spec.dtype.itemsize for spec in specs.values())


def _free_on_host() -> int:
    """What the machine has, within this process's limits."""
    available = _field("/proc/meminfo", "MemAvailable")
    return min([available or machine_bytes() // 2, *_limits()])


def _limits() -> list[int]:
    """What a container and `ulimit -d` leave to this process."""
    import resource

    left = []
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        left.append(soft - _field("/proc/self/status", "VmData"))
    own = _CONTROL_GROUPS / _own_group().lstrip("/")
    for group in (own, *own.parents):  # the limit of any group above holds too
        with suppress(OSError, ValueError):  # not limited
            limit = int((group / "memory.max").read_text())
            taken = int((group / "memory.current").read_text())
            left.append(limit - taken + _cached_files(group))
    return [max(each, 0) for each in left]


def _own_group() -> str:
    """The control group (cgroup v2) of this process, as a path from the root of them all."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return "/"
    return next((line[3:] for line in lines if line.startswith("0::")), "/")


def _cached_files(group: Path) -> int:
    """Bytes of files that a container counts as its memory, and gives back when it is needed."""
    lines = (group / "memory.stat").read_text().splitlines()
    stat = dict(line.split() for line in lines)
    return int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))


def _field(path: str, name: str) -> int:
    """Bytes that a file of /proc gives in kB under a name; 0 where it does not exist."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)
