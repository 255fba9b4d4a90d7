"""Define `recall demo`: merge and evaluate the shipped models."""

from pathlib import Path
from typing import Annotated

import typer

from recall_jax.cli import console
from recall_jax.cli import options as opt


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("recall_demo"),
    force: opt.Force = False,
    no_compilation_cache: opt.NoCache = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Merge and evaluate the shipped models.

    Merges by RECALL and by averaging, and writes the report of the merge by RECALL.

    \b
    Example: recall demo --out recall_demo
    """
    console.prepare_jax(no_compilation_cache)
    from recall_jax.experiments.demo.run import PAGE, run_demo

    with console.progress_bar(quiet) as progress:
        table = run_demo(out, force=force, progress=progress)
    if quiet:
        return
    rows = [[cell if isinstance(cell, str) else _share(cell) for cell in row] for row in table.rows]
    console.show_table("exact match", table.columns, rows)
    console.say(f"what was merged, and why each layer is weighed as it is: {out / PAGE}", quiet)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
