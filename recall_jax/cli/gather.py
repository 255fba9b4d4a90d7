"""Define `recall gather`: join the parts of a distributed merge."""

from pathlib import Path
from typing import Annotated

import typer

from recall_jax.cli import console
from recall_jax.cli import options as opt


def gather(
    parts: Annotated[
        list[Path], typer.Argument(help="The folders of all processes, in any order.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist.")],
    force: opt.Force = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Join the parts of a model that several machines have written.

    These are the folders that recall merge --distributed --parts wrote on the disk of each machine,
    copied to one machine.

    \b
    Example: recall gather part-0 part-1 --out merged
    """
    console.prepare_jax()
    from recall_jax.engine.pod.gather import gather as run

    with console.progress_bar(quiet) as progress:
        run(parts, out, force=force, progress=progress)
    console.say(f"{len(parts)} parts joined in {out}", quiet)
