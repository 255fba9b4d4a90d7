"""Define `recall plan`: predict the cost of a merge on any machine."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recall_jax.cli import console
from recall_jax.cli import options as opt
from recall_jax.errors import InputError

if TYPE_CHECKING:
    from recall_jax.cost.machines import Machine
    from recall_jax.cost.model import Cost
    from recall_jax.cost.work import MergeWork
    from recall_jax.recipes.recipe import Recipe


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML.")],
    devices: Annotated[
        str, typer.Option("--devices", help="Such as v5e-16, v5p-32, v6e-64, h200-8 or cpu-8.")
    ],
    mesh: Annotated[
        str, typer.Option("--mesh", help="Such as data=2,fsdp=4,tensor=2; auto chooses.")
    ] = "auto",
    storage: Annotated[
        str, typer.Option("--storage", help="Storage bandwidth of each host.")
    ] = "1GB/s",
    ignore_config: opt.IgnoreConfig = None,
    plugin: opt.Plugin = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Predict what a merge will cost: bytes, operations, memory, time.

    The prediction needs only configs and headers, and is for any machine, not the current one.

    \b
    Example: recall plan configs/recall.yml --devices v5e-16
    """
    console.prepare_jax()
    from recall_jax.cost.machines import find_machine
    from recall_jax.cost.model import plan_cost
    from recall_jax.parallel.mesh import parse_mesh
    from recall_jax.recipes.plugins import load_plugins
    from recall_jax.recipes.recipe import read_recipe

    machine = find_machine(devices)
    sizes = None if mesh == "auto" else parse_mesh(mesh)
    rate = console.size_in_bytes(storage.removesuffix("/s"))
    load_plugins(plugin or [])
    planned = read_recipe(recipe).changed(ignore_config=ignore_config)
    work = merge_work(planned, machine)
    cost = plan_cost(work, machine, mesh=sizes, storage=rate)
    if as_json:
        console.say(json.dumps(_record(work, cost, rate), indent=1).splitlines(), quiet)
    elif not quiet:
        _show(planned, work, cost, rate)


def merge_work(recipe: "Recipe", machine: "Machine") -> "MergeWork":
    """Return the work of a recipe's merge, from the configs and headers of its models.

    Raises InputError for a method whose cost is not modelled, or models that do not match.
    """
    from recall_jax.cost.model import PLANNED
    from recall_jax.cost.work import MergeWork
    from recall_jax.engine.configs import check_configs
    from recall_jax.engine.merge import check_layers
    from recall_jax.engine.plan import full_tensor_names, open_inputs, plan_merge
    from recall_jax.methods.registry import METHODS

    needs = METHODS[recipe.merge_method].needs
    if not PLANNED.meets(needs) or recipe.tree is not None:
        what = "JAX trees" if recipe.tree is not None else recipe.merge_method
        known = [name for name, method in METHODS.items() if PLANNED.meets(method.needs)]
        raise InputError(
            f"plan does not know the cost of {what}; it knows, of Hugging Face folders, that of "
            f"{', '.join(known)}"
        )
    inputs = open_inputs([entry.model for entry in recipe.models], recipe.base_model)
    read, models = inputs.all, inputs.models
    warnings = check_configs(read, recipe.ignore_config)
    merged = plan_merge(inputs, out_dtype=recipe.out_dtype or recipe.dtype)
    check_layers(recipe.by_layer, merged.specs)
    forward = None
    if recipe.needs.observes:
        forward = _forward(recipe, models, machine)
    console.warn(warnings)
    units = merged.units.values()
    full = full_tensor_names(needs.full_tensors, merged.specs)
    return MergeWork(
        [sum(model.stored[name].nbytes for model in read for name in names) for names in units],
        [sum(merged.specs[name].nbytes for name in names) for names in units],
        len(read),
        len(models),
        forward,
        max((math.prod(merged.specs[name].shape) for name in full), default=0),
    )


def _forward(recipe: "Recipe", models: Any, machine: "Machine") -> Any:
    from recall_jax.checkpoint.dtypes import DTYPES
    from recall_jax.cost.work import ForwardWork
    from recall_jax.engine.budget import widest
    from recall_jax.engine.inputs import common_architecture
    from recall_jax.engine.select import clustered_units

    arch = common_architecture(models, recipe.ignore_config)
    assert recipe.samples is not None
    samples = recipe.samples
    name = recipe.compute_dtype
    if name is None:
        narrow = not machine.is_cpu and any(
            spec.dtype == DTYPES["bfloat16"] for spec in models[-1].stored.values()
        )
        name = "bfloat16" if narrow else "float32"
    chosen = samples.typical is None and samples.pool > samples.count
    last = clustered_units(samples.unit, arch)[-1]
    return ForwardWork(
        arch,
        typical=samples.count,
        pool=samples.pool,
        tokens=samples.max_tokens,
        batch_size=samples.batch_size,
        select_units=arch.units.index(last) + 1 if chosen else 0,
        itemsize=DTYPES[name].itemsize,
        stored=max(widest(model.specs) for model in models),
    )


def _record(work: "MergeWork", cost: "Cost", storage: int) -> dict[str, Any]:
    allowed = None if cost.machine.is_cpu else cost.allowed
    return {
        "devices": cost.machine.name,
        "num_devices": cost.machine.devices,
        "num_hosts": cost.machine.hosts,
        "mesh": dict(cost.mesh),
        "models": work.models,
        "bytes": {"read": cost.bytes_read, "written": cost.bytes_written},
        "flops": dict(cost.flops),
        "passes": cost.passes,
        "device_memory_bytes": dict(cost.device_memory),
        "device_memory_allowed_bytes": allowed,
        "host_memory_bytes": dict(cost.host_memory),
        "fits": cost.fits,
        "seconds": {"select": cost.select_s, "merge": cost.merge_s, "total": cost.seconds},
        "assumptions": _assumptions(work, cost.machine, storage),
    }


def _show(recipe: "Recipe", work: "MergeWork", cost: "Cost", storage: int) -> None:
    from recall_jax.parallel.mesh import format_mesh

    machine, flops = cost.machine, cost.flops
    print(
        f"{recipe.merge_method} of {work.models} models on {machine.name}: "
        f"{_count(machine.devices, 'device')} of {_count(machine.hosts, 'host')}, "
        f"mesh {format_mesh(cost.mesh)}"
    )
    print(
        f"{_size(cost.bytes_read)} read ({_size(cost.bytes_read / machine.hosts)} by each host), "
        f"{_size(cost.bytes_written)} written"
    )
    if work.forward is not None:
        print(
            f"{flops['select'] / 1e12:,.3g} TFLOP to choose the typical samples in "
            f"{_count(cost.passes, 'pass', 'es')}, {flops['forward'] / 1e12:,.3g} to compare"
        )
    for where, held in ("device", cost.device_memory), ("host", cost.host_memory):
        rows = [[part, _size(size)] for part, size in held.items()]
        rows.append(["together", _size(sum(held.values()))])
        console.show_table(f"memory of each {where}", ["part", "bytes"], rows)
    parts = list(dict.fromkeys([*cost.select_s, *cost.merge_s]))
    rows = [
        [part, *(_seconds(walk.get(part)) for walk in (cost.select_s, cost.merge_s))]
        for part in parts
    ]
    console.show_table("seconds", ["part", "choosing samples", "merging"], rows)
    print(f"{_seconds(cost.seconds)} s in all; reading, computing and writing overlap")
    if not machine.is_cpu:
        needed = f"{_size(sum(cost.device_memory.values()))} of {_size(cost.allowed)} allowed"
        print(f"{'fits' if cost.fits else 'does not fit'} the memory of a device: {needed}")
    print(f"assumed: {_assumptions(work, machine, storage)}")


def _assumptions(work: "MergeWork", machine: "Machine", storage: int) -> str:
    assumed = [f"{_size(storage)}/s of storage for each host"]
    if work.forward is not None:
        assumed.append(f"{machine.kind.efficiency:.0%} of the peak of matrix products")
        assumed.append(f"every row has {work.forward.tokens} tokens")
    assumed += ["other rates as published", "start-up and compilation left out", "nothing measured"]
    return ", ".join(assumed)


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{plural * (number != 1)}"


def _size(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size / 1e3:,.1f} kB"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:,.3g}" if seconds < 100 else f"{seconds:,.0f}"
