"""Tables of what RECALL of large Llamas costs on pods: computed, none of it measured.

    .venv/bin/python benchmarks/pods.py [--storage 1e9]

Prints the Markdown that docs/pods.md has: 20 typical samples of 1,024 rows of 512 tokens, bfloat16.
"""

import argparse

from recall_jax.cost.machines import GB, Machine, find_machine
from recall_jax.cost.model import Cost, plan_cost
from recall_jax.cost.work import llama, recall_work
from recall_jax.errors import InputError
from recall_jax.models.architecture import Architecture
from recall_jax.parallel.mesh import AXES, MODEL

SHAPES = {
    "7B": llama(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "70B": llama(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "405B": llama(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
    ),
}
MODELS = (2, 4, 8)
MACHINES = (
    *("v5e-16", "v5e-64", "v5e-256"),
    *("v5p-32", "v5p-128"),
    *("v6e-16", "v6e-64", "v6e-256"),
    *("h200-8", "h200-32"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", type=float, default=GB, help="bytes a second of each host")
    storage = parser.parse_args().storage
    print("\n\n".join(table(name, arch, storage) for name, arch in SHAPES.items()))


def table(name: str, arch: Architecture, storage: float) -> str:
    """The table of one shape, in Markdown."""
    counts = ", ".join(map(str, MODELS))
    lines = [
        f"| Llama {name} | devices, hosts | data, fsdp, tensor | GB of a device, K = {counts} | "
        f"allowed | minutes, K = {counts} | most of it, K = {MODELS[-1]} |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in MACHINES:
        machine = find_machine(each)
        costs = [_cost(arch, models, machine, storage) for models in MODELS]
        known = [cost for cost in costs if cost is not None]
        if not known:
            lines.append(f"| {each} | {machine.devices}, {machine.hosts} | none fits | | | | |")
            continue
        last = known[-1]
        cells = [
            each,
            f"{machine.devices}, {machine.hosts}",
            ", ".join(str(last.mesh[axis]) for axis in AXES if axis != MODEL),
            ", ".join(_memory(cost) for cost in costs),
            f"{last.allowed / GB:.1f}",
            ", ".join(_minutes(cost) for cost in costs),
            _slowest(last) if last.fits else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cost(arch: Architecture, models: int, machine: Machine, storage: float) -> Cost | None:
    try:
        return plan_cost(recall_work(arch, models), machine, storage=storage)
    except InputError:  # no mesh fits
        return None


def _memory(cost: Cost | None) -> str:
    return "-" if cost is None else f"{sum(cost.device_memory.values()) / GB:.1f}"


def _minutes(cost: Cost | None) -> str:
    if cost is None or not cost.fits:
        return "-"
    minutes = cost.seconds / 60
    return f"{minutes:.1f}" if minutes >= 1 else f"{minutes:.2f}"


def _slowest(cost: Cost) -> str:
    """What the walk waits for most of the time."""
    parts: dict[str, float] = {}
    for part, seconds in cost.merge_s.items():
        stage = part.partition(":")[0]
        parts[stage] = parts.get(stage, 0.0) + seconds
    return max(parts, key=lambda part: parts[part])


if __name__ == "__main__":
    main()
