"""Define `recall ablate`: measure how much each choice of a merge by RECALL matters."""

from pathlib import Path
from typing import Annotated

import typer

from recall_jax.cli import console
from recall_jax.cli import options as opt


def ablate(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write; by default the recipe's name, here."),
    ] = None,
    memory: opt.Memory = None,
    ignore_config: opt.IgnoreConfig = None,
    device: opt.Device = None,
    resume: opt.Resume = False,
    force: opt.Force = False,
    no_compilation_cache: opt.NoCache = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Vary one choice of a RECALL recipe at a time, merge and evaluate.

    Each merged model is removed once it has been evaluated.

    \b
    Example: recall ablate configs/ablation.yml --out varied
    """
    console.prepare_jax(no_compilation_cache, device)
    from recall_jax.experiments.ablation.recipe import read_ablation
    from recall_jax.experiments.ablation.run import PAGE, AblationOptions
    from recall_jax.experiments.ablation.run import ablate as run
    from recall_jax.report.ablation_page import overview

    ablation = read_ablation(recipe)
    if ignore_config:
        ablation = ablation.model_copy(update={"ignore_config": tuple(ignore_config)})
    out = out or Path(recipe.stem)
    options = AblationOptions(console.optional_size(memory), force, resume, inputs=[recipe])
    with console.progress_bar(quiet) as progress:
        record = run(
            ablation,
            out,
            options=options,
            progress=progress,
            announce=lambda line: console.say(line, quiet),
        )
    console.warn(record["warnings"])
    if quiet:
        return
    table = overview(record)
    rows = [["–" if cell is None else str(cell) for cell in row] for row in table.rows]
    console.show_table("Means over all tasks ± standard error", table.columns, rows)
    console.say(f"a table and a plot for each choice: {out / PAGE}", quiet)
