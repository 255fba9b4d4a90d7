"""Print results on stdout, progress and warnings on stderr."""

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from recall_jax.cli.programs_folder import programs_folder
from recall_jax.cli.wording import worded
from recall_jax.errors import InputError, escaped, shown

if TYPE_CHECKING:
    from recall_jax.files.progress import Progress

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@contextmanager
def progress_bar(quiet: bool) -> Iterator["Progress"]:
    """Yield a callback that displays progress: steps done, bytes moved, rate, time left.

    It draws a bar on stderr, only if that is a terminal and the command is not quiet.
    """
    from recall_jax.files.progress import silent

    if quiet or not sys.stderr.isatty():
        yield silent
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
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[moved]}", markup=False),
        TimeRemainingColumn(),
    )
    began: float | None = None
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("preparing", total=None, moved="")

        def show(
            doing: str, done: int, total: int, *, read: int = 0, written: int = 0, note: str = ""
        ) -> None:
            nonlocal began
            began = began or time.monotonic()  # exclude the time before the first byte
            moved = f"{read / 1e9:.2f} GB in, {written / 1e9:.2f} out"
            if (seconds := time.monotonic() - began) > 0.1:
                moved += f", {(read + written) / 1e6 / seconds:,.0f} MB/s"
            doing = escaped(doing)
            bar.update(
                task,
                description=doing if len(doing) <= 24 else f"…{doing[-23:]}",
                completed=done,
                total=total,
                moved=moved if read + written else escaped(note),
            )

        yield show


def say(lines: str | Sequence[str], quiet: bool) -> None:
    """Print a result on stdout, one line or several, unless quiet."""
    if not quiet:
        for line in [lines] if isinstance(lines, str) else lines:
            print(escaped(line))


def warn(lines: Sequence[str]) -> None:
    """Print warnings on stderr, one line each, quiet or not."""
    for line in lines:
        sys.stderr.write(f"warning: {escaped(worded(' '.join(line.split())))}\n")


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; the first column is text, the others are numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=escaped(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(
            escaped(column), justify="left" if index == 0 else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(escaped, row))
    # A pipe has no width; a program that reads it must not get folded lines.
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False, markup=False).print(table)


def size_in_bytes(text: str) -> int:
    """Return the bytes of a size such as 5GB, 500MB or 2GiB; InputError if it is invalid."""
    number = text.strip().rstrip("BKMGTIbkmgti")
    unit = text.strip()[len(number) :].upper() or "B"
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise InputError(
            f"{shown(text)} is no size: write one such as 5GB, 500MB or 2GiB"
        ) from None
    if size < 1:
        raise InputError(f"{shown(text)} is no size: it must be above zero")
    return size


def optional_size(text: str | None) -> int | None:
    """Return the bytes of a size as `size_in_bytes` does, None if it is None."""
    return None if text is None else size_in_bytes(text)


def prepare_jax(no_compilation_cache: bool = False, device: str | None = None) -> None:
    """Import jax, select the device, and cache compiled programs in the user's cache folder.

    Raises InputError if there is no such device.
    """
    import jax

    from recall_jax.cli import signals

    signals.begin()
    if device is not None:
        choose_device(device)
    # Libraries' warnings are for their callers; commands print warnings for users themselves.
    warnings.simplefilter("ignore")
    if no_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    jax.config.update("jax_compilation_cache_dir", str(programs_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def choose_device(device: str) -> None:
    """Select the kind of device to run on; InputError if there is none.

    This initialises jax's devices.
    """
    import jax

    if device not in ("cpu", "gpu", "tpu"):
        raise InputError(f"--device {device}: use cpu, gpu or tpu")
    jax.config.update("jax_platforms", device)
    try:
        jax.devices()
    except RuntimeError as error:
        raise InputError(
            f"JAX finds no {device} here: install its plugin for it, or leave --device out"
        ) from error
