"""Define `recall continual`: learn tasks in sequence by several strategies."""

from pathlib import Path
from typing import Annotated

import typer

from recall_jax.cli import console
from recall_jax.cli import options as opt


def continual(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write; by default the recipe's name, here."),
    ] = None,
    ignore_config: opt.IgnoreConfig = None,
    plugin: opt.Plugin = None,
    device: opt.Device = None,
    resume: opt.Resume = False,
    force: opt.Force = False,
    no_compilation_cache: opt.NoCache = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Learn tasks in sequence by several strategies, and measure what each retains.

    \b
    Example: recall continual configs/continual/strings.yml --out strings-learnt
    """
    console.prepare_jax(no_compilation_cache, device)
    from recall_jax.experiments.continual.recipe import read_protocol
    from recall_jax.experiments.continual.run import PAGE, ContinualOptions
    from recall_jax.experiments.continual.run import continual as run
    from recall_jax.recipes.plugins import load_plugins
    from recall_jax.report.continual_page import continual_summary

    plugins = plugin or []
    load_plugins(plugins)
    protocol = read_protocol(recipe)
    if ignore_config:
        protocol = protocol.model_copy(update={"ignore_config": tuple(ignore_config)})
    out = out or Path(recipe.stem)
    with console.progress_bar(quiet) as progress:
        record = run(
            protocol,
            out,
            options=ContinualOptions(force=force, resume=resume, inputs=[recipe], plugins=plugins),
            progress=progress,
            announce=lambda line: console.say(line, quiet),
        )
    console.warn(record["warnings"])
    if quiet:
        return
    table = continual_summary(record, "*{}")
    rows = [["–" if cell is None else str(cell) for cell in row] for row in table.rows]
    console.show_table("Mean ± standard deviation, * best", table.columns, rows)
    console.say(f"every matrix, and how each task fares: {out / PAGE}", quiet)
