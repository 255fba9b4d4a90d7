"""Define `recall rows`: write the training rows of a task for `recall finetune`."""

from pathlib import Path
from typing import Annotated

import typer

from recall_jax.cli import console, signals
from recall_jax.cli import options as opt


def rows(
    task: Annotated[str, typer.Argument(help="Evaluation task, by name or .yml file.")],
    out: Annotated[Path, typer.Option("--out", help="File to write, .jsonl.")],
    split: Annotated[
        str, typer.Option("--split", help="Split to write; not the one that is evaluated.")
    ] = "train",
    data_root: Annotated[
        Path | None,
        typer.Option(
            "--data-root",
            help="Folder with a folder of rows for each task; without it, rows come from the hub.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Take at most this many rows, by seed.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the draw of rows.")
    ] = 0,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Write a task's training rows: the prompts of the evaluation, with the right answers.

    \b
    Example: recall rows sst2 --limit 10000 --out sst2.train.jsonl
    """
    from recall_jax.evaluation.examples import make_examples
    from recall_jax.evaluation.rows import load_rows
    from recall_jax.evaluation.task import find_task
    from recall_jax.evaluation.training_rows import training_rows, with_split
    from recall_jax.files.output import output_file
    from recall_jax.inputs.data import write_jsonl

    signals.begin()
    training_task = with_split(find_task(task), split)
    found = load_rows(training_task, data_root)
    drawn = found.draw(limit, seed)
    made = training_rows(training_task, make_examples(training_task, drawn))
    with output_file(out, force=force, inputs=found.files) as file:
        write_jsonl(file, made)
    console.say(f"{len(made):,} of {len(found.rows):,} rows of {found.source} in {out}", quiet)
