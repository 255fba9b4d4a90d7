"""What a command shows: results on stdout, progress and warnings on stderr."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from recall_jax.errors import InputError

Progress = Callable[[str, int, int], None]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress]:
    """Yield a function to call with (what is done now, steps done, steps in all).

    A bar on stderr, only if that is a terminal and the command is not quiet.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import (
        Progress as Bar,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading headers", total=None)

        def show(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        yield show


def say(text: str, quiet: bool) -> None:
    """Print a result on stdout, unless quiet."""
    if not quiet:
        print(text)


def warn(lines: Sequence[str]) -> None:
    """Print warnings on stderr, one line each, quiet or not."""
    for line in lines:
        sys.stderr.write(f"warning: {' '.join(line.split())}\n")


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; the first column is text, the others are numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # A pipe has no width of its own: never fold what a program may read.
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False, markup=False).print(table)


def size_in_bytes(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB, or InputError."""
    number = text.strip().rstrip("BKMGTIbkmgti")
    unit = text.strip()[len(number) :].upper() or "B"
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise InputError(f"{text!r} is no size: write one such as 5GB, 500MB or 2GiB") from None
    if size < 1:
        raise InputError(f"{text!r} is no size: it must be above zero")
    return size


def prepare_jax(no_compilation_cache: bool = False) -> None:
    """Import jax and let it keep compiled programs in the user's cache folder."""
    import jax

    # Libraries' warnings are for their callers; what a user must know, we say in words of ours.
    warnings.simplefilter("ignore")
    if no_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(home, "recall_jax", "xla").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
