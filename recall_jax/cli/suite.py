"""Define `recall suite`: train models for continual learning, from a seed without a download."""

from pathlib import Path
from typing import Annotated

import typer

from recall_jax.cli import console
from recall_jax.cli import options as opt
from recall_jax.errors import InputError


def suite(
    name: Annotated[str, typer.Argument(help="strings (exact answers) or text (perplexity).")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write or to continue.")],
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of weights, rows and order.")
    ] = 0,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Fine-tune on these, comma-separated; by default on all."),
    ] = None,
    device: opt.Device = None,
    force: opt.Force = False,
    no_compilation_cache: opt.NoCache = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Train a base model on all tasks of a suite, and a fine-tune on each.

    Complete models of an interrupted suite are kept.

    \b
    Example: recall suite strings --out strings --seed 0 --tasks reverse,sort,tree
    """
    if name not in ("strings", "text"):
        raise InputError(f"no suite {name!r}: choose strings or text")
    console.prepare_jax(no_compilation_cache, device)
    from recall_jax.experiments.suites.strings import strings_suite
    from recall_jax.experiments.suites.suite import BASE, make_suite
    from recall_jax.experiments.suites.text import text_suite

    chosen = strings_suite(seed) if name == "strings" else text_suite(seed)
    wanted = chosen.tasks if tasks is None else tuple(map(str.strip, tasks.split(",")))
    with console.progress_bar(quiet) as progress:
        make_suite(
            chosen,
            out,
            wanted,
            force=force,
            progress=progress,
            announce=lambda line: console.say(line, quiet),
        )
    models = " ".join(str(out / model) for model in (BASE, *wanted))
    evaluated = ",".join(f"{name}_{task}" for task in chosen.tasks)
    console.say(f"next: recall evaluate {models} --tasks {evaluated}", quiet)
