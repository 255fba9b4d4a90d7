"""Define `recall evaluate`: evaluate models on tasks."""

from pathlib import Path
from typing import Annotated

import typer

from recall_jax.cli import console
from recall_jax.cli import options as opt
from recall_jax.errors import InputError


def evaluate(
    models: Annotated[
        list[str] | None, typer.Argument(help="Models, each a row of the table.")
    ] = None,
    tasks: Annotated[
        str, typer.Option("--tasks", help="Tasks, comma-separated, by name or .yml file.")
    ] = "",
    data_root: Annotated[
        Path | None,
        typer.Option(
            "--data-root",
            help="Folder with a folder of rows for each task; without it, rows come from the hub.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Take at most this many rows of a task, by seed."),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the draw of rows.")
    ] = 0,
    batch_size: opt.BatchSize = 8,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write: evaluation.json, index.html, predictions."),
    ] = None,
    list_tasks: Annotated[
        bool, typer.Option("--list", help="List the tasks that come with recall, and exit.")
    ] = False,
    show: Annotated[
        str | None,
        typer.Option(
            "--show", metavar="TASK", help="Print a task's file, as a template for yours."
        ),
    ] = None,
    compute_dtype: opt.ComputeDtype = None,
    ignore_config: opt.IgnoreConfig = None,
    device: opt.Device = None,
    resume: opt.Resume = False,
    force: opt.Force = False,
    no_compilation_cache: opt.NoCache = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Evaluate models on tasks.

    \b
    Example: recall evaluate base math merged --tasks sst2,race,own.yml --data-root data --out seen
    """
    from recall_jax.evaluation.task import find_task, find_tasks, task_names, task_text

    if list_tasks or show is not None:
        if show is not None and show not in task_names():
            raise InputError(f"no task {show!r}: choose from {', '.join(task_names())}")
        lines = [f"{name}: {find_task(name).about}" for name in task_names()]
        console.say(task_text(show).splitlines() if show else lines, quiet=False)
        return
    if not models:
        raise InputError("name at least one model")
    chosen = find_tasks([name.strip() for name in tasks.split(",") if name.strip()])
    if resume and out is None:
        raise InputError("--resume continues an output: add --out")
    console.prepare_jax(no_compilation_cache, device)
    from recall_jax.jobs.evaluate import EvaluateOptions
    from recall_jax.jobs.evaluate import evaluate as evaluate_models
    from recall_jax.report.evaluation_page import evaluation_summary

    options = EvaluateOptions(
        data_root,
        limit,
        seed,
        batch_size,
        compute_dtype,
        tuple(ignore_config or ()),
        force,
        resume,
    )
    with console.progress_bar(quiet) as progress:
        record = evaluate_models(models, chosen, out, options=options, progress=progress)
    console.warn(record["warnings"])
    if quiet:
        return
    table = evaluation_summary(record)
    rows = [[str(cell) for cell in row] for row in table.rows]
    console.show_table("Results ± standard error", table.columns, rows)
    if out is not None:
        console.say(f"every number and every answer: {out / 'index.html'}", quiet)
