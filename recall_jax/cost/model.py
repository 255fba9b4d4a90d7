"""Model the cost of a merge on a machine: bytes, operations, memory and seconds.

The model follows the engine, and uses its bounds of memory. Each process reads once the rows that
its devices hold; two units are in memory in rows layout. The forward sends each parameter over the
interconnect, in the dtype in which it is sent, and gathers parameters sharded over `fsdp` for every
batch. A merged piece is summed over all devices, and the host that writes its unit copies it from
one of them. All hosts write at the same time, each different units. Reading, computing and writing
overlap.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from recall_jax.checkpoint.units import EMBED, layer_unit
from recall_jax.cost.machines import GB, Machine
from recall_jax.cost.work import ForwardWork, MergeWork, flops_per_position, state_parameters
from recall_jax.engine.budget import SHARE
from recall_jax.engine.chunks import CHUNK
from recall_jax.engine.memory import (
    block_bytes,
    copied_bytes,
    largest_tensor_bytes,
    largest_unit_bytes,
    mesh_that_fits,
    working_bytes,
)
from recall_jax.engine.needs import Observation, Offer
from recall_jax.engine.stream import BACKLOG
from recall_jax.errors import InputError
from recall_jax.parallel.mesh import AXES, DATA, FSDP, MODEL, TENSOR, format_mesh

# The cost is modelled only for methods whose needs this offer meets.
PLANNED = Offer(observes=(Observation.POOLED,), samples=("none", "newest"), passes=1)

Mesh = Mapping[str, int]
_FLOAT32 = 4
_WORD = 4  # least bytes of an element of a piece while it is summed
_FULL_COPIES = 6  # number of arrays of the tensor's size, for each model, if a kernel needs it full
_ONE_DEVICE = dict.fromkeys(AXES, 1)


@dataclass(frozen=True)
class Cost:
    """State the cost of a merge, in bytes and seconds by part.

    `select_s` and `merge_s` are the seconds of selecting typical samples and of the merge, by parts
    `read`, `write` and `compute: …`; the three stages before the colon overlap. `device_memory` and
    `host_memory` are those of each device and of each host.
    """

    machine: Machine
    mesh: Mesh
    bytes_read: int
    bytes_written: int
    flops: Mapping[str, float]
    passes: int
    device_memory: Mapping[str, float]
    host_memory: Mapping[str, float]
    select_s: Mapping[str, float]
    merge_s: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Return the total time: each walk takes as long as its slowest stage."""
        return _overlapped(self.select_s) + _overlapped(self.merge_s)

    @property
    def allowed(self) -> float:
        """Return the most bytes that a run uses of a device."""
        return SHARE * self.machine.kind.memory

    @property
    def fits(self) -> bool:
        """Return whether each device has enough memory; hosts mostly hold mapped files."""
        return sum(self.device_memory.values()) <= self.allowed


def plan_cost(
    work: MergeWork, machine: Machine, *, mesh: Mesh | None = None, storage: float = GB
) -> Cost:
    """Return the cost of a merge if each host reads, or writes, `storage` bytes a second.

    Without a mesh, one is chosen as the engine does.

    Raises:
        InputError: if the mesh does not have the machine's devices, or none fits the memory.
    """
    if mesh is None:
        mesh = _choose_mesh(work, machine)
    if math.prod(mesh.values()) != machine.devices:
        raise InputError(
            f"mesh {format_mesh(mesh)} has {math.prod(mesh.values())} devices and {machine.name} "
            f"{machine.devices}: give one of as many"
        )
    if work.models % mesh[MODEL]:
        raise InputError(f"mesh model={mesh[MODEL]} does not divide {work.models} models")
    work, device = _fit_batches(work, machine, mesh)
    passes, kept = 0, False
    flops, select = {"select": 0.0, "forward": 0.0}, dict[str, float]()
    if (forward := work.forward) is not None:
        flops["forward"] = work.models * _flops(forward, forward.typical)
    if forward is not None and forward.select_units:
        pool = _hidden_bytes(forward, forward.pool, _one_model(mesh))
        left = SHARE * machine.kind.memory - sum(device.values()) + device["hidden states"]
        passes = max(1, math.ceil(pool / left)) if left > 0 else 1  # if nothing fits
        device["hidden states"] = max(device["hidden states"], pool / passes)
        model = work.bytes_read // work.inputs
        kept = passes == 1 and model / machine.hosts <= SHARE * machine.kind.host_memory
        flops["select"] = _flops(forward, forward.pool, forward.select_units)
        select = _select_seconds(work, machine, mesh, passes, storage)
    extra_passes = passes - 1 if kept else passes
    host = {
        "rows of three units": 3 * max(work.read) / machine.hosts,
        "merged pieces": (BACKLOG + 2) * CHUNK * _WORD,
        "a unit to be written": max(work.written) if machine.hosts > 1 else 0,
    }
    if kept:
        host["model that chose"] = work.bytes_read / work.inputs / machine.hosts
    return Cost(
        machine,
        mesh,
        work.bytes_read + extra_passes * work.select_bytes,
        work.bytes_written,
        flops,
        passes,
        device,
        host,
        select,
        _merge_seconds(work, machine, mesh, storage, work.select_bytes if kept else 0),
    )


def _choose_mesh(work: MergeWork, machine: Machine) -> Mesh:
    """Choose the mesh as the engine does; without a forward any mesh is equivalent."""
    forward = work.forward
    if forward is None or machine.devices == 1:
        return _ONE_DEVICE | {DATA: machine.devices}
    return mesh_that_fits(
        forward.arch,
        itemsize=forward.itemsize,
        devices=machine.devices,
        memory=int(SHARE * machine.kind.memory),
    )


def _fit_batches(
    work: MergeWork, machine: Machine, mesh: Mesh
) -> tuple[MergeWork, dict[str, float]]:
    """Halve the batch size until it fits, and return the memory used on each device."""
    device = _device_memory(work, machine, mesh)
    while (forward := work.forward) is not None and forward.batch_size > 1:
        if sum(device.values()) <= SHARE * machine.kind.memory:
            break
        work = replace(work, forward=replace(forward, batch_size=forward.batch_size // 2))
        device = _device_memory(work, machine, mesh)
    return work, device


def _device_memory(work: MergeWork, machine: Machine, mesh: Mesh) -> dict[str, float]:
    """Return the bytes used on each device, by part."""
    on_cpu = machine.is_cpu
    memory: dict[str, float] = {
        # On CPU these are mapped files.
        "rows of two units": 0 if on_cpu else 2 * max(work.read) / machine.devices,
        "merged rows and pieces": 0 if on_cpu else max(work.written) / machine.devices,
    }
    memory["merged rows and pieces"] += (BACKLOG + 2) * CHUNK * _WORD
    if work.largest_full_tensor:
        copies = 1 + _FULL_COPIES / machine.devices  # gathered once, the others sharded
        memory["tensors taken whole"] = copies * work.inputs * work.largest_full_tensor * _FLOAT32
    if (forward := work.forward) is not None:
        arch, splits = forward.arch, mesh[DATA] * mesh[FSDP]
        block = block_bytes(arch, forward.itemsize)
        computed = largest_unit_bytes(arch, forward.itemsize) / (mesh[FSDP] * mesh[TENSOR])
        computed += copied_bytes(arch, 1, forward.itemsize, on_cpu=on_cpu) / mesh[TENSOR]
        if mesh[FSDP] > 1:
            computed += block / mesh[TENSOR]
        most = max(forward.typical, forward.pool if forward.select_units else 0)
        rows = forward.rows_each(most, splits)
        states = _hidden_bytes(forward, forward.typical, mesh)
        memory |= {
            "parameters as computed": computed,
            "hidden states": work.models // mesh[MODEL] * states,
            "activations": working_bytes(arch, rows, forward.length, 1),
        }
        if not on_cpu:
            memory["a tensor on its way"] = mesh[MODEL] * largest_tensor_bytes(arch, forward.stored)
    return memory


def _hidden_bytes(forward: ForwardWork, rows: int, mesh: Mesh) -> float:
    """Return the bytes of one model's hidden states on a device."""
    positions = forward.positions(rows, mesh[DATA] * mesh[FSDP])
    return positions * forward.arch.hidden_size * forward.itemsize


def _one_model(mesh: Mesh) -> Mesh:
    """Return the mesh for one model, whose rows are sharded over the axis `model` too."""
    return {**mesh, MODEL: 1, DATA: mesh[DATA] * mesh[MODEL]}


def _flops(forward: ForwardWork, rows: int, units: int | None = None) -> float:
    """Return the operations of one model's first `units` units, by default all, over rows."""
    names = forward.arch.units[:units]
    per_position = sum(flops_per_position(forward.arch, unit, forward.length) for unit in names)
    return float(rows * forward.length * per_position)


def _select_seconds(
    work: MergeWork, machine: Machine, mesh: Mesh, passes: int, storage: float
) -> dict[str, float]:
    """Return the seconds of selecting typical samples, by part."""
    forward, read = work.forward, passes * work.select_bytes
    assert forward is not None
    return {
        "read": _read_seconds(read, machine, storage),
        **_forward_seconds(
            forward, machine, _one_model(mesh), 1, forward.pool, forward.select_units, passes
        ),
    }


def _merge_seconds(
    work: MergeWork, machine: Machine, mesh: Mesh, storage: float, kept: int
) -> dict[str, float]:
    """Return the seconds of the merge, by part, if hosts have `kept` bytes in memory already."""
    seconds = {"read": _read_seconds(work.bytes_read, machine, storage, kept)}
    if (forward := work.forward) is not None:
        units, rows = len(forward.arch.units), forward.typical
        seconds |= _forward_seconds(forward, machine, mesh, work.models, rows, units)
    others = 1 - 1 / machine.devices
    moved = (work.bytes_read + work.bytes_written) / machine.devices
    seconds["compute: merge"] = moved / machine.kind.bandwidth
    # A sum over all devices sends every byte twice: to reduce, and to return the sum.
    seconds["compute: pieces"] = 2 * others * work.bytes_written / machine.link
    most = max(sum(work.written[host :: machine.hosts]) for host in range(machine.hosts))
    seconds["write"] = max(most / storage, work.bytes_written / machine.kind.host_link)
    return seconds


def _read_seconds(size: int, machine: Machine, storage: float, kept: int = 0) -> float:
    """Return the seconds from storage to the hosts and from there to the devices, which overlap."""
    to_devices = size / (machine.devices * machine.kind.host_link)
    return max((size - kept) / (machine.hosts * storage), to_devices)


def _forward_seconds(
    forward: ForwardWork,
    machine: Machine,
    mesh: Mesh,
    models: int,
    rows: int,
    units: int,
    passes: int = 1,
) -> dict[str, float]:
    """Return the seconds of the first `units` units of some models over rows, by part."""
    arch, splits = forward.arch, mesh[DATA] * mesh[FSDP]
    names = arch.units[:units]
    in_turn = models // min(mesh[MODEL], models)
    positions = forward.positions(rows, splits)
    per_position = sum(flops_per_position(arch, unit, forward.length) for unit in names)
    compute = in_turn * positions * per_position / mesh[TENSOR]
    # In the narrower dtype; a parameter may be gathered in full before it is resharded.
    itemsize = min(forward.stored, forward.itemsize)
    parameter_bytes = sum(itemsize * state_parameters(arch, unit) for unit in names)
    sent = passes * models * parameter_bytes * (1 - 1 / machine.devices)
    blocks = sum(unit != EMBED for unit in names)
    gathered = (
        forward.batches(rows, splits) * blocks * forward.state_bytes(layer_unit(0)) / mesh[TENSOR]
    )
    sent += in_turn * gathered * (1 - 1 / mesh[FSDP])
    # A block has two sums over `tensor`, each of which sends every byte twice.
    summed = 4 * blocks * positions * arch.hidden_size * forward.itemsize
    sent += in_turn * summed * (1 - 1 / mesh[TENSOR])
    return {
        "compute: forward": compute / (machine.kind.efficiency * machine.kind.flops),
        "compute: interconnect": sent / machine.link,
    }


def _overlapped(seconds: Mapping[str, float]) -> float:
    """Return the time of the slowest stage: parts of one stage add up, stages overlap."""
    stages: dict[str, float] = {}
    for part, duration in seconds.items():
        stage = part.partition(":")[0]
        stages[stage] = stages.get(stage, 0.0) + duration
    return max(stages.values(), default=0.0)
