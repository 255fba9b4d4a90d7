"""Define `recall convert`, `recall inspect` and `recall verify`."""

import dataclasses
import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from recall_jax.cli import console
from recall_jax.cli import options as opt
from recall_jax.errors import escaped

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def convert(
    source: Annotated[str, typer.Argument(help="Folder, folder+adapter, or folder of a tree.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    to: Annotated[
        str, typer.Option("--to", help="huggingface (safetensors), or the Flax tree: orbax or npz.")
    ] = "huggingface",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bfloat16, float16, float32 or float64.")
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Write the head of a tied model as a separate tensor.")
    ] = False,
    shard_size: opt.ShardSize = "5GB",
    ignore_config: opt.IgnoreConfig = None,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Convert a checkpoint to another format.

    Folds adapters in, turns .bin into safetensors, and goes to and from Orbax and npz.

    \b
    Example: recall convert base+french-lora french
    """
    console.prepare_jax()
    from recall_jax.jobs.convert import convert as run

    warnings = run(
        source,
        out,
        to,
        dtype=dtype,
        shard_bytes=console.size_in_bytes(shard_size),
        force=force,
        ignore_config=ignore_config or (),
        untie=untie,
    )
    console.warn(warnings)
    console.say(f"{source} converted to {to} in {out}", quiet)


def inspect(
    model: Annotated[
        str, typer.Argument(help="Folder, folder+adapter, adapter, hub id, or JAX tree.")
    ],
    ignore_config: opt.IgnoreConfig = None,
    as_json: Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Describe the contents of a model folder.

    Prints the family, units, sizes, dtypes, tied weights and adapters of a model; the base, rank
    and targets of an adapter; the leaves of a JAX tree.

    \b
    Example: recall inspect checkpoints/math
    """
    console.prepare_jax()
    from recall_jax.jobs.trees.names import names_tree

    found, show = _tree(model) if names_tree(model) else _model(model, ignore_config or ())
    if quiet:
        return
    if as_json:
        console.say(json.dumps(found, indent=1).splitlines(), quiet)
    else:
        show(found)


def _tree(name: str) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    from recall_jax.jobs.trees.files import describe_tree, open_tree

    return describe_tree(open_tree(name)), _show_tree


def _show_tree(found: dict[str, Any]) -> None:
    rows = [
        [name, str(each["shape"]), each["dtype"], _megabytes(each["bytes"])]
        for name, each in found["leaves"].items()
    ]
    console.say(
        f"{found['tree']}: {found['format']}, {found['parameters']:,} numbers in "
        f"{len(rows)} leaves, {_megabytes(found['bytes'])}",
        quiet=False,
    )
    console.show_table("leaves", ["name", "shape", "dtype", "size"], rows)


def _model(
    name: str, ignore_config: Collection[str]
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    from recall_jax.checkpoint.folder import open_checkpoint
    from recall_jax.checkpoint.model_names import find_adapter
    from recall_jax.jobs.convert import describe_adapter, describe_checkpoint

    if (folder := find_adapter(name)) is not None:
        return describe_adapter(folder), _show_adapter
    return describe_checkpoint(open_checkpoint(name, headers_only=True), ignore_config), _show_model


def _show_adapter(found: dict[str, Any]) -> None:
    kind = "DoRA" if found["use_dora"] else "rsLoRA" if found["use_rslora"] else "LoRA"
    base = found["base_model"] or "a base it does not name"
    console.say(
        f"{found['adapter']}: {kind} adapter of {base}, "
        f"rank {found['rank']}, alpha {found['alpha']:g}, {found['parameters']:,} parameters, "
        f"{_megabytes(found['bytes'])}, {', '.join(found['dtypes'])}",
        quiet=False,
    )
    rows = [
        [
            target,
            str(each["modules"]),
            ", ".join(map(str, each["ranks"])),
            f"{each['parameters']:,}",
            _megabytes(each["bytes"]),
        ]
        for target, each in found["targets"].items()
    ]
    console.show_table("targets", ["target", "modules", "rank", "parameters", "size"], rows)
    if found["saved"]:
        console.say(f"saved in full: {', '.join(found['saved'])}", quiet=False)


def _show_model(found: dict[str, Any]) -> None:
    rows = [
        [
            unit,
            str(each["tensors"]),
            f"{each['parameters']:,}",
            _megabytes(each["bytes"]),
            ", ".join(each["dtypes"]),
        ]
        for unit, each in found["units"].items()
    ]
    console.say(
        f"{found['model']}: {found['model_type']}, {found['parameters']:,} parameters, "
        f"{_megabytes(found['bytes'])}, {', '.join(found['dtypes'])}, "
        f"{'tied' if found['tied'] else 'untied'} head, "
        f"adapters: {', '.join(found['adapters']) or 'none'}",
        quiet=False,
    )
    console.show_table("units", ["unit", "tensors", "parameters", "size", "dtypes"], rows)
    console.warn(found["warnings"])
    if len(found["stacks"]) > 1:
        console.say(f"layers that share their units: {', '.join(found['stacks'])}", quiet=False)
    if found["quantised"]:
        console.say(f"quantised ({found['quantised']}): not to be merged or run", quiet=False)
    elif found["why_not"]:
        console.say(f"not for methods that run the model: {found['why_not']}", quiet=False)


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, an adapter or a tree.")],
    ignore_config: opt.IgnoreConfig = None,
    as_json: Json = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Check a folder against its checksums.

    For any Hugging Face folder, also checks that headers, index, config and tensors match. The exit
    status is 1 if a check fails.

    \b
    Example: recall verify merged
    """
    console.prepare_jax()
    from recall_jax.jobs import verify as verification

    with console.progress_bar(quiet) as progress:
        found = verification.verify(folder, progress, ignore_config=ignore_config or ())
    faults = f"{len(found.faults)} fault{'s' if len(found.faults) > 1 else ''}"
    if as_json:
        verdict = {"good": not found.faults, **dataclasses.asdict(found)}
        console.say(json.dumps(verdict, indent=1).splitlines(), quiet)
    else:
        is_model = found.kind in ("model", "adapter")
        checked = "structure checked" if is_model else "config checked"
        if found.files:
            checked = f"{found.files} files checked, {_megabytes(found.nbytes)}"
        lines = [f"{folder}: {faults if found.faults else 'good'} ({found.kind}, {checked})"]
        lines += [f"  fault: {fault}" for fault in found.faults]
        lines += [f"  note: {note}" for note in found.notes]
        console.say(lines, quiet)
    if found.faults:
        line = f"{folder} failed verification: {faults}, first: {found.faults[0]}"
        sys.stderr.write(f"recall: {escaped(' '.join(line.split()))}\n")
        raise typer.Exit(1)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
