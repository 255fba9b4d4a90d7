"""Define `recall merge` and `recall quick`."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recall_jax.cli import console
from recall_jax.cli import options as opt
from recall_jax.errors import InputError
from recall_jax.inputs.shapes import Fields

if TYPE_CHECKING:
    from recall_jax.parallel.processes import Processes
    from recall_jax.recipes.recipe import Recipe


def merge(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    typical: opt.TypicalFile = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", help="Weights per unit from `recall weights` or a report."),
    ] = None,
    plugin: opt.Plugin = None,
    shard_size: opt.ShardSize = "5GB",
    compute_dtype: opt.ComputeDtype = None,
    ignore_config: opt.IgnoreConfig = None,
    ignore_tokenizers: opt.IgnoreTokenizers = False,
    memory: opt.Memory = None,
    device: opt.Device = None,
    mesh: opt.Mesh = None,
    distributed: opt.Distributed = False,
    parts: opt.WriteParts = False,
    to: opt.MergedTo = "huggingface",
    resume: opt.Resume = False,
    force: opt.Force = False,
    no_compilation_cache: opt.NoCache = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Merge models by a recipe.

    \b
    Example: recall merge configs/recall.yml merged
    """
    from recall_jax.recipes.plugins import load_plugins
    from recall_jax.recipes.recipe import read_recipe

    plugins = plugin or []
    load_plugins(plugins)
    plan = read_recipe(recipe)
    samples = None
    if typical is not None:
        given = plan.samples.model_dump(exclude={"data"}) if plan.samples else {}
        samples = given | {"typical": str(typical)}
    plan = plan.changed(
        samples=samples,
        weights=weights and str(weights),
        compute_dtype=compute_dtype,
        ignore_config=ignore_config,
        ignore_tokenizers=ignore_tokenizers or None,
    )
    _run(plan, out, [recipe], _Run.of(locals()), plugins)


def quick(
    models: Annotated[list[str], typer.Argument(help="Models to merge; the last is the newest.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist.")],
    data: opt.Data = None,
    typical: opt.TypicalFile = None,
    field: opt.Field = None,
    prompt_field: opt.PromptField = None,
    completion_field: opt.CompletionField = None,
    count: opt.Count = 20,
    pool: opt.Pool = 1024,
    max_tokens: opt.MaxTokens = 512,
    batch_size: opt.BatchSize = 8,
    seed: opt.Seed = 0,
    unit: opt.Unit = "last",
    sigma: Annotated[str, typer.Option("--sigma", help="median, dim or a number.")] = "median",
    temperature: Annotated[
        float,
        typer.Option("--temperature", help="Temperature of the softmax over models; above 0."),
    ] = 1.0,
    out_dtype: Annotated[
        str | None, typer.Option("--out-dtype", help="bfloat16, float16, float32 or float64.")
    ] = None,
    shard_size: opt.ShardSize = "5GB",
    compute_dtype: opt.ComputeDtype = None,
    ignore_config: opt.IgnoreConfig = None,
    ignore_tokenizers: opt.IgnoreTokenizers = False,
    memory: opt.Memory = None,
    device: opt.Device = None,
    mesh: opt.Mesh = None,
    distributed: opt.Distributed = False,
    parts: opt.WriteParts = False,
    to: opt.MergedTo = "huggingface",
    resume: opt.Resume = False,
    force: opt.Force = False,
    no_compilation_cache: opt.NoCache = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Merge models by RECALL without a recipe.

    \b
    Example: recall quick base math base+french-lora --data french.jsonl --out merged
    """
    from recall_jax.recipes.recipe import make_recipe

    fields = Fields(field, prompt_field, completion_field)
    samples = sample_values(data, typical, fields, pool, max_tokens, batch_size, seed)
    values = {
        "merge_method": "recall",
        "models": [{"model": model} for model in models],
        "parameters": {"sigma": as_number(sigma), "temperature": temperature},
        "samples": samples | {"count": count, "unit": as_number(unit)},
        "out_dtype": out_dtype,
        "compute_dtype": compute_dtype,
        "ignore_config": ignore_config or [],
        "ignore_tokenizers": ignore_tokenizers,
    }
    recipe = make_recipe(values, where="options")
    _run(recipe, out, [], _Run.of(locals()))


def sample_values(
    data: Path | None,
    typical: Path | None,
    fields: Fields,
    pool: int,
    max_tokens: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Return a recipe's `samples`, from the options shared by all commands that take samples."""
    return {
        "data": data and str(data),
        "typical": typical and str(typical),
        "field": fields.text,
        "prompt_field": fields.prompt,
        "completion_field": fields.completion,
        "pool": pool,
        "max_tokens": max_tokens,
        "batch_size": batch_size,
        "seed": seed,
    }


def as_number(text: str) -> int | float | str:
    """Return a number if the text is one, else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class _Run:
    """Hold the options that do not change the merged model."""

    shard_size: str
    memory: str | None
    device: str | None
    mesh: str | None
    distributed: bool
    parts: bool
    to: str
    resume: bool
    force: bool
    no_compilation_cache: bool
    quiet: bool
    debug: bool

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "_Run":
        """Select them by name among all options of a command."""
        return cls(**{field.name: options[field.name] for field in fields(cls)})


def _run(
    recipe: "Recipe", out: Path, inputs: list[Path], run: _Run, plugins: Sequence[Path] = ()
) -> None:
    if run.parts and not run.distributed:
        raise InputError("--parts is for several processes: add --distributed, or leave it out")
    if not run.distributed:
        console.prepare_jax(run.no_compilation_cache, run.device)
        _merge(recipe, out, inputs, run, plugins)
        return
    console.prepare_jax(run.no_compilation_cache)
    from recall_jax.jobs.trees.names import names_tree
    from recall_jax.parallel.watch import ADVICE, joined

    is_tree = run.to == "orbax" or recipe.tree is not None or names_tree(recipe.models[-1].model)
    advice = "start all processes again" if is_tree else ADVICE  # merges of trees do not resume
    with joined(advice=advice, debug=run.debug) as processes:
        if run.device is not None:
            console.choose_device(run.device)
        # Only one process prints what is the same for all.
        local = replace(run, quiet=run.quiet or processes.index > 0)
        _merge(recipe, out, inputs, local, plugins, processes)


def _merge(
    recipe: "Recipe",
    out: Path,
    inputs: list[Path],
    run: _Run,
    plugins: Sequence[Path],
    processes: "Processes | None" = None,
) -> None:
    from recall_jax.jobs import merge as job
    from recall_jax.jobs.outcome import PAGE
    from recall_jax.parallel.processes import ALONE

    processes = processes or ALONE
    options = job.MergeOptions(
        force=run.force,
        resume=run.resume,
        shard_bytes=console.size_in_bytes(run.shard_size),
        memory=console.optional_size(run.memory),
        inputs=inputs,
        plugins=plugins,
        mesh=run.mesh,
        parts=run.parts,
        to=run.to,
        processes=processes,
    )
    # The plan is printed immediately on a terminal, with the result in a file or pipe.
    interactive = sys.stdout.isatty()
    with console.progress_bar(run.quiet) as progress:
        report = job.merge(
            recipe,
            out,
            options=options,
            progress=progress,
            announce=lambda line: console.say(line, run.quiet or not interactive),
        )
    if processes.index == 0:
        console.warn(report["warnings"])
    if not interactive:
        console.say(report["plan"], run.quiet)
    console.say(_summary(report, out, out / PAGE), run.quiet)


def _summary(report: dict[str, Any], out: Path, page: Path) -> list[str]:
    """Return a few lines about a finished merge."""
    lines = [f"merged {len(report['models'])} models into {out} by {report['method']}"]
    width = max(len(name) for name in report["models"])
    for name, weights in zip(report["models"], report["weights"], strict=True):
        mean = sum(weights) / len(weights)
        lines.append(
            f"  {name:<{width}}  mean weight {mean:.3f}  ({min(weights):.3f} to {max(weights):.3f})"
        )
    if report["weight_rises_with_depth"] is not None:
        rises = "rises" if report["weight_rises_with_depth"] else "does not rise"
        lines.append(f"  the newest model's weight {rises} with depth")
    if report["resumed_units"]:
        lines.append(f"  {report['resumed_units']} units were written before the interruption")
    read, written = (report["bytes"][key] / 1e6 for key in ("read", "written"))
    seconds = report["timing_s"]["total"]
    lines.append(f"  {read:.1f} MB read, {written:.1f} MB written, {seconds:.1f} s")
    lines.append(f"  why each layer is weighed as it is: {page}")
    return lines
