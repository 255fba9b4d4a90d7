"""The cost model: bytes, operations, memory and seconds of a merge on a machine.

As the engine does it, and with its own bounds of memory. Each process reads the rows of its own
devices once, and two units are held in rows. The forward passes each parameter over the
interconnect, in the dtype in which it is sent, and gathers what `fsdp` cuts for every batch. A
merged piece is summed over all devices, and the host that owns its unit takes it from one of them.
All hosts write at once, each its own units. Reading, computing and writing overlap.
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

# Of methods with other needs the cost is not known.
PLANNED = Offer(observes=(Observation.POOLED,), samples=("none", "newest"), passes=1)

Mesh = Mapping[str, int]
_FLOAT32 = 4
_WORD = 4  # bytes of an element of a piece on its way, at least
_WHOLE = 6  # arrays as large as a whole tensor, for each model, where a kernel sees it
_ALONE = dict.fromkeys(AXES, 1)


@dataclass(frozen=True)
class Cost:
    """What a merge costs; bytes and seconds by part.

    `select_s` and `merge_s` are the seconds of the choice of typical samples and of the walk: parts
    named `read`, `write` and `compute: …`, of which those of the first word overlap the others.
    Memory is of each device and of each host.
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
        """Of both walks, each as long as the slowest of what overlaps in it."""
        return _overlapped(self.select_s) + _overlapped(self.merge_s)

    @property
    def allowed(self) -> float:
        """Bytes that a run takes of a device at most."""
        return SHARE * self.machine.kind.memory

    @property
    def fits(self) -> bool:
        """Whether a device has the memory; what a host holds is mostly mapped files."""
        return sum(self.device_memory.values()) <= self.allowed


def plan_cost(
    work: MergeWork, machine: Machine, *, mesh: Mesh | None = None, storage: float = GB
) -> Cost:
    """The cost of a merge, with `storage` bytes a second read, or written, by each host.

    The mesh is chosen where none is given.

    Raises:
        InputError: where a mesh does not have the machine's devices, or none fits its memory.
    """
    if mesh is None:
        mesh = _chosen(work, machine)
    if math.prod(mesh.values()) != machine.devices:
        raise InputError(
            f"mesh {format_mesh(mesh)} has {math.prod(mesh.values())} devices and {machine.name} "
            f"{machine.devices}: give one of as many"
        )
    if work.models % mesh[MODEL]:
        raise InputError(f"mesh model={mesh[MODEL]} does not divide {work.models} models")
    work, device = _fitted(work, machine, mesh)
    passes, kept = 0, False
    flops, select = {"select": 0.0, "forward": 0.0}, dict[str, float]()
    if (forward := work.forward) is not None:
        flops["forward"] = work.models * _flops(forward, forward.typical)
    if forward is not None and forward.choosing:
        pool = _hidden_bytes(forward, forward.pool, _alone(mesh))
        left = SHARE * machine.kind.memory - sum(device.values()) + device["hidden states"]
        passes = max(1, math.ceil(pool / left)) if left > 0 else 1  # where nothing fits
        device["hidden states"] = max(device["hidden states"], pool / passes)
        model = work.bytes_read // work.inputs
        kept = passes == 1 and model / machine.hosts <= SHARE * machine.kind.host_memory
        flops["select"] = _flops(forward, forward.pool, forward.choosing)
        select = _select_seconds(work, machine, mesh, passes, storage)
    again = passes - 1 if kept else passes
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
        work.bytes_read + again * work.chosen_by,
        work.bytes_written,
        flops,
        passes,
        device,
        host,
        select,
        _merge_seconds(work, machine, mesh, storage, work.chosen_by if kept else 0),
    )


def _chosen(work: MergeWork, machine: Machine) -> Mesh:
    """As the engine chooses it; without a forward any will do."""
    forward = work.forward
    if forward is None or machine.devices == 1:
        return _ALONE | {DATA: machine.devices}
    return mesh_that_fits(
        forward.arch,
        itemsize=forward.itemsize,
        devices=machine.devices,
        memory=int(SHARE * machine.kind.memory),
    )


def _fitted(work: MergeWork, machine: Machine, mesh: Mesh) -> tuple[MergeWork, dict[str, float]]:
    """With batches as large as asked, or halved until they fit, and the memory of each device."""
    device = _device_memory(work, machine, mesh)
    while (forward := work.forward) is not None and forward.batch_size > 1:
        if sum(device.values()) <= SHARE * machine.kind.memory:
            break
        work = replace(work, forward=replace(forward, batch_size=forward.batch_size // 2))
        device = _device_memory(work, machine, mesh)
    return work, device


def _device_memory(work: MergeWork, machine: Machine, mesh: Mesh) -> dict[str, float]:
    """Bytes on each device, by part."""
    on_cpu = machine.is_cpu
    memory: dict[str, float] = {
        # on CPU they are mapped files
        "rows of two units": 0 if on_cpu else 2 * max(work.read) / machine.devices,
        "merged rows and pieces": 0 if on_cpu else max(work.written) / machine.devices,
    }
    memory["merged rows and pieces"] += (BACKLOG + 2) * CHUNK * _WORD
    if work.whole:
        parts = 1 + _WHOLE / machine.devices  # brought together, and what is made of a part
        memory["tensors taken whole"] = parts * work.inputs * work.whole * _FLOAT32
    if (forward := work.forward) is not None:
        arch, splits = forward.arch, mesh[DATA] * mesh[FSDP]
        block = block_bytes(arch, forward.itemsize)
        computed = largest_unit_bytes(arch, forward.itemsize) / (mesh[FSDP] * mesh[TENSOR])
        computed += copied_bytes(arch, 1, forward.itemsize, on_cpu=on_cpu) / mesh[TENSOR]
        if mesh[FSDP] > 1:
            computed += block / mesh[TENSOR]
        most = max(forward.typical, forward.pool if forward.choosing else 0)
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
    """Hidden states of one model on a device."""
    positions = forward.positions(rows, mesh[DATA] * mesh[FSDP])
    return positions * forward.arch.hidden_size * forward.itemsize


def _alone(mesh: Mesh) -> Mesh:
    """The mesh as a model alone has it: its rows lie along `model` too."""
    return {**mesh, MODEL: 1, DATA: mesh[DATA] * mesh[MODEL]}


def _flops(forward: ForwardWork, rows: int, units: int | None = None) -> float:
    """Operations of one model over rows, up to a unit."""
    names = forward.arch.units[:units]
    each = sum(flops_per_position(forward.arch, unit, forward.length) for unit in names)
    return float(rows * forward.length * each)


def _select_seconds(
    work: MergeWork, machine: Machine, mesh: Mesh, passes: int, storage: float
) -> dict[str, float]:
    """Seconds of the choice of typical samples, by part."""
    forward, read = work.forward, passes * work.chosen_by
    assert forward is not None
    return {
        "read": _read_seconds(read, machine, storage),
        **_forward_seconds(
            forward, machine, _alone(mesh), 1, forward.pool, forward.choosing, passes
        ),
    }


def _merge_seconds(
    work: MergeWork, machine: Machine, mesh: Mesh, storage: float, kept: int
) -> dict[str, float]:
    """Seconds of the walk, by part, with `kept` bytes in the hosts' memory already."""
    seconds = {"read": _read_seconds(work.bytes_read, machine, storage, kept)}
    if (forward := work.forward) is not None:
        units, rows = len(forward.arch.units), forward.typical
        seconds |= _forward_seconds(forward, machine, mesh, work.models, rows, units)
    others = 1 - 1 / machine.devices
    moved = (work.bytes_read + work.bytes_written) / machine.devices
    seconds["compute: merge"] = moved / machine.kind.bandwidth
    # summed over all devices: sent, and sent back
    seconds["compute: pieces"] = 2 * others * work.bytes_written / machine.link
    own = max(sum(work.written[host :: machine.hosts]) for host in range(machine.hosts))
    seconds["write"] = max(own / storage, work.bytes_written / machine.kind.host_link)
    return seconds


def _read_seconds(size: int, machine: Machine, storage: float, kept: int = 0) -> float:
    """From storage to the hosts, and on to the devices, which overlap."""
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
    """Seconds of the forward of some models over rows, up to a unit."""
    arch, splits = forward.arch, mesh[DATA] * mesh[FSDP]
    names = arch.units[:units]
    in_turn = models // min(mesh[MODEL], models)
    own = forward.positions(rows, splits)
    each = sum(flops_per_position(arch, unit, forward.length) for unit in names)
    compute = in_turn * own * each / mesh[TENSOR]
    # In the narrower dtype; a parameter may be gathered whole before it is cut.
    sent = min(forward.stored, forward.itemsize)
    cut = sum(sent * state_parameters(arch, unit) for unit in names)
    passed = passes * models * cut * (1 - 1 / machine.devices)
    blocks = sum(unit != EMBED for unit in names)
    gathered = (
        forward.batches(rows, splits) * blocks * forward.state_bytes(layer_unit(0)) / mesh[TENSOR]
    )
    passed += in_turn * gathered * (1 - 1 / mesh[FSDP])
    # Two sums over `tensor` in a block, each sent and sent back.
    summed = 4 * blocks * own * arch.hidden_size * forward.itemsize
    passed += in_turn * summed * (1 - 1 / mesh[TENSOR])
    return {
        "compute: forward": compute / (machine.kind.efficiency * machine.kind.flops),
        "compute: interconnect": passed / machine.link,
    }


def _overlapped(seconds: Mapping[str, float]) -> float:
    """The longest of what goes on at a time."""
    together: dict[str, float] = {}
    for part, each in seconds.items():
        stage = part.partition(":")[0]
        together[stage] = together.get(stage, 0.0) + each
    return max(together.values(), default=0.0)
