"""List machines by name with their published figures, in bytes and seconds; GB are 10^9 bytes.

Sources, as of November 2026: docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e (peak in bfloat16,
HBM, interconnect, machine types and their RAM); NVIDIA's data sheets of A100 80GB SXM, H100 SXM and
H200 SXM (dense peaks) and of the DGX A100, H100 and H200. Google publishes no bandwidth between a
host and its chips: 15 GB/s a chip is from "How to Scale Your Model" (Austin et al. 2025), part 2.
"""

import math
import re
from dataclasses import dataclass, replace

from recall_jax.errors import InputError, shown

GB = 10**9
TERA = 10**12
UNKNOWN = math.inf


@dataclass(frozen=True)
class MachineKind:
    """Describe a device and its host.

    `flops` is the peak rate of matrix products in bfloat16 (float32 on CPU), in operations a
    second; the forward is assumed to reach the fraction `efficiency` of it. `memory` is in bytes,
    `bandwidth` is that of the memory. In bytes a second, `link` is what a device receives from the
    others of its slice or node over all its links, `host_link` what it exchanges with its host, and
    `network` what a host sends to other hosts if they are not one slice. A host has `per_host`
    devices and `host_memory` bytes.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    host_link: float
    per_host: int
    host_memory: float
    network: float = UNKNOWN
    efficiency: float = 0.4  # assumed; not measured on TPU or GPU


# The interconnect of TPUs is half the published bandwidth, which adds both directions. In slices
# with several VMs, each has 4 chips.
_TPUS = {
    "v5e": MachineKind(197 * TERA, 16 * GB, 819 * GB, 200 * GB, 15 * GB, 4, 192 * GB),
    "v5p": MachineKind(459 * TERA, 95 * GB, 2765 * GB, 600 * GB, 15 * GB, 4, 448 * GB),
    "v6e": MachineKind(918 * TERA, 32 * GB, 1638 * GB, 400 * GB, 15 * GB, 4, 720 * GB),
}
# NVLink and PCIe in one direction; a node has eight adapters of 200 (A100) or 400 Gbit/s.
_GPUS = {
    "a100": MachineKind(312 * TERA, 80 * GB, 2039 * GB, 300 * GB, 32 * GB, 8, 2000 * GB, 200 * GB),
    "h100": MachineKind(989 * TERA, 80 * GB, 3350 * GB, 450 * GB, 64 * GB, 8, 2000 * GB, 400 * GB),
    "h200": MachineKind(989 * TERA, 141 * GB, 4800 * GB, 450 * GB, 64 * GB, 8, 2000 * GB, 400 * GB),
}
# A core of an AMD EPYC: measured 505 GFLOP/s on two, in float32 products of 2048 x 2048 matrices.
_CORE = MachineKind(250 * GB, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, 1, UNKNOWN, efficiency=0.6)
_SLICES = (1, 4, 8, 16, 32, 64, 128, 256)

KNOWN = (
    f"v5e-N and v6e-N with N chips ({', '.join(map(str, _SLICES))}), v5p-N with N/2 chips "
    "(N = 8, 16, 24, …), a100-N, h100-N and h200-N with N GPUs (up to 8, or nodes of 8), and "
    "cpu-N with N cores"
)


@dataclass(frozen=True)
class Machine:
    """Describe a number of devices of one kind, on a number of hosts."""

    name: str
    kind: MachineKind
    devices: int
    hosts: int

    @property
    def is_cpu(self) -> bool:
        """Return whether the host itself computes."""
        return self.kind.link == UNKNOWN

    @property
    def link(self) -> float:
        """Return the bytes a second that each device receives in a collective over all devices.

        Over several nodes the devices form a ring, which passes through the network of each node.
        """
        return min(self.kind.link, self.kind.network) if self.hosts > 1 else self.kind.link


def find_machine(name: str) -> Machine:
    """Return the machine of a name such as v5e-16, as Google calls it, or h200-8.

    The number of a v5p counts TensorCores, of which a chip has two. Raises InputError for an
    unknown name.
    """
    found = re.fullmatch(r"(v5e|v5litepod|v5p|v6e|a100|h100|h200|cpu)-([1-9]\d{0,4})", name)
    if found:
        family, size = found[1].replace("v5litepod", "v5e"), int(found[2])
        if family in ("v5e", "v6e") and size in _SLICES:
            return _slice(name, _TPUS[family], size)
        if family == "v5p" and size % 8 == 0:
            return _slice(name, _TPUS[family], size // 2)
        if family in _GPUS and (size <= 8 or size % 8 == 0):
            return Machine(name, _GPUS[family], size, -(-size // 8))
        if family == "cpu":
            return Machine(name, replace(_CORE, flops=size * _CORE.flops), 1, 1)
    raise InputError(f"no machine {shown(name)} is known; known are {KNOWN}")


def _slice(name: str, kind: MachineKind, chips: int) -> Machine:
    """Return a slice of TPUs; up to 8 chips (v5p: 4) are a single VM."""
    single = chips <= 4 or (chips == 8 and not name.startswith("v5p"))
    return Machine(name, kind, chips, 1 if single else chips // kind.per_host)
