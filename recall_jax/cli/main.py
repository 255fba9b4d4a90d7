"""Run the command line `recall`, with one unwrapped line for every error.

Exit status: 0 success, 1 a failed check or a bug, 2 a user's error, 129 hung up, 130
interrupted, 143 terminated.
"""

import functools
import io
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import typer

from recall_jax.cli import (
    ablate,
    bench,
    checkpoints,
    continual,
    demo,
    evaluate,
    finetune,
    gather,
    merge,
    plan,
    rows,
    signals,
    similarity,
    stages,
    suite,
)
from recall_jax.cli.mapped_files import explain_lost_bytes
from recall_jax.cli.wording import OUT_OF_MEMORY, speak_for, worded
from recall_jax.errors import InputError, brief, escaped, is_out_of_memory

app = typer.Typer(
    name="recall",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Merge fine-tuned checkpoints without losing what each has learnt.",
    epilog="Start with: recall demo",
)
app.command("demo")(demo.demo)
app.command("merge")(merge.merge)
app.command("quick")(merge.quick)
app.command("select")(stages.select)
app.command("extract")(stages.extract)
app.command("weights")(stages.weights)
app.command("similarity")(similarity.similarity)
app.command("finetune")(finetune.finetune)
app.command("evaluate")(evaluate.evaluate)
app.command("suite")(suite.suite)
app.command("rows")(rows.rows)
app.command("continual")(continual.continual)
app.command("ablate")(ablate.ablate)
app.command("convert")(checkpoints.convert)
app.command("inspect")(checkpoints.inspect)
app.command("verify")(checkpoints.verify)
app.command("plan")(plan.plan)
app.command("gather")(gather.gather)
app.add_typer(bench.bench, name="bench")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line and exit with its status."""
    # A shell can close the streams; output is then discarded.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a narrow encoding fails no command
            stream.reconfigure(errors="backslashreplace")
    arguments = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    signals.catch()
    explain_lost_bytes()
    # Silence the logs of XLA and transformers; errors that matter come as exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about missing torch
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # about failed tasks of Orbax
    sys.exit(_run(arguments))


def run() -> None:
    """Run `main` as the command `recall`, and exit immediately.

    This skips the shutdown of the interpreter and of XLA, which takes a quarter of a second.
    """
    try:
        main()
    except SystemExit as end:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a pipe whose reader has gone
                stream.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


@functools.cache
def _command() -> Any:
    """Return the command line that typer makes of `app`, which takes it a while."""
    return typer.main.get_command(app)


def _run(arguments: Sequence[str]) -> int:
    command = _command()
    speak_for(command, arguments)
    debug = "--debug" in arguments
    try:
        result = command(arguments, prog_name="recall", standalone_mode=False)
    except SystemExit as end:
        if end.code not in signals.STATUSES:
            raise
        return _complain(signals.STATUSES[end.code], end.code, end)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        if (status := _signal_behind(error)) is not None:
            return _complain(signals.STATUSES[status], status, error)
        if hasattr(error, "format_message"):  # a usage error from click
            return _complain(_usage(error), 2, error)
        if debug:
            raise
        if isinstance(error, InputError) or is_out_of_memory(error):
            message = str(error) if isinstance(error, InputError) else OUT_OF_MEMORY
            return _complain(worded(message), 2, error)
        if isinstance(error, OSError) and error.strerror:  # a full disk, a lost folder
            where = f"{error.filename}: " if error.filename else ""
            return _complain(f"{where}{error.strerror}", 2, error)
        fault = f"{type(error).__name__}: {brief(error)}"
        return _complain(f"a bug in recall, please report it with --debug: {fault}", 1, error)
    return result if isinstance(result, int) else 0


def _signal_behind(error: BaseException) -> int | None:
    """Return the exit status of a signal that caused an error, None if there was no signal.

    A C callback turns the SystemExit of a signal into a SystemError; and once the terminal has
    hung up, removing a progress bar fails.
    """
    while cause := error.__cause__ or error.__context__:
        if isinstance(cause, SystemExit) and cause.code in signals.STATUSES:
            return cause.code
        error = cause
    return None


def _complain(message: str, status: int, error: BaseException) -> int:
    """Print one line with the error's notes, and return the status."""
    notes = dict.fromkeys(getattr(error, "__notes__", ()))  # nested works add the same note
    line = "; ".join([message, *notes])
    with suppress(OSError, ValueError):  # stderr is closed
        sys.stderr.write(f"recall: {escaped(' '.join(line.split()))}\n")
        sys.stderr.flush()
    return status


def _usage(error: BaseException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "recall"
    return f"{error.format_message().rstrip('.')}; see {command} --help"  # type: ignore[attr-defined]
