"""Outputs that are absent or complete, never half.

What is written goes to a hidden folder beside it, `.NAME.recall-work`, and takes its final name by
one rename when everything has reached the disk. That of a quick output is removed on any error,
interrupts included. That of a long work has a journal: it outlives a failing disk, a signal or a
kill, and the work can be resumed. What a kill leaves of either is swept by the next run of any
command with the same output.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from recall_jax.errors import InputError, UnfinishedError, storage_faults
from recall_jax.files.interruption import uninterrupted
from recall_jax.files.publish import confirm, publish_file, publish_folder, sync_tree
from recall_jax.files.workplace import (
    alone,
    clear,
    is_resumable,
    journal_of,
    long_work,
    new_output,
    workplace,
)

_KEPT = "what is done is kept"


@dataclass(frozen=True)
class Work:
    """An unfinished output: the folder that becomes it, and the journal of what is done.

    The journal is the caller's to write; work without one, or with an empty one, is not resumed.
    """

    folder: Path
    journal: Path
    discarded: bool = False  # what an interrupted work had left

    @property
    def scratch(self) -> Path:
        """Beside them, where the caller may put what is not for `out`; removed with the work."""
        return self.folder.with_name("scratch")


@contextmanager
def output_folder(out: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block ends without error.

    With `force`, an `out` that exists is replaced in one step and then removed. InputError, before
    anything is done, if `out` exists without `force`, is a file, holds one of `inputs` or the
    current folder, cannot be created, or is being written by a living process; StorageError if the
    disk fails.
    """
    target = _target(out)
    with _place_of(target, out, partial(_refuse_folder, target, out, force, inputs)) as home:
        hidden = new_output(home)
        publish = partial(publish_folder, hidden, target, replace=force)
        with _at_once(home, target, out, publish):
            yield hidden


@contextmanager
def work_folder(
    out: Path, *, force: bool = False, resume: bool = False, inputs: Iterable[Path] = ()
) -> Iterator[Work]:
    """Yield the place of a long work whose folder becomes `out` when the block ends without error.

    What an interrupted work has left is taken up with `resume`, else removed. An InputError removes
    it too; a kill and every other exception (UnfinishedError, a signal, a fault of ours) leaves it
    for the next resume if it, or a work within it, has noted anything, and the exception gets a
    note that says so. InputError as for `output_folder`.
    """
    target = _target(out)
    with _place_of(target, out, partial(_refuse_folder, target, out, force, inputs)) as home:
        found = is_resumable(home)
        work = Work(long_work(home), journal_of(home), discarded=found and not resume)
        published = False
        try:
            with _faults_of(out):
                if not (resume and found):
                    clear(home)
                work.folder.mkdir(exist_ok=True)
            yield work
            with _faults_of(out):
                sync_tree(work.folder)
                with uninterrupted(), _set_aside(work.journal):  # `folder` is soon the old `out`
                    publish_folder(work.folder, target, replace=force)
                    published = True
            confirm(target, out)
        except BaseException as error:
            if not published and _outlived(error) and is_resumable(home):
                error.add_note(_advice(error))
                raise
            _drop(home)
            _promise_nothing(error)
            raise
        _drop(home)


@contextmanager
def output_file(path: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield an empty file, of the same name, that becomes `path` when the block ends well.

    InputError as for `output_folder`.
    """
    target = _target(path)
    with _place_of(target, path, partial(_refuse_file, target, path, force, inputs)) as home:
        hidden = new_output(home) / target.name
        publish = partial(publish_file, hidden, target, replace=force)
        with _at_once(home, target, path, publish):
            with _faults_of(path):
                hidden.touch()
            yield hidden


@contextmanager
def _place_of(target: Path, out: Path, refuse: Callable[[], None]) -> Iterator[Path]:
    """The workplace of an output that is not refused, held until the block has ended."""
    home = workplace(target)
    if os.path.isdir(home):  # of one that was killed, perhaps between publishing and removing
        with suppress(InputError), alone(home, target, out):
            pass
    refuse()
    with _parents_of(target, out), alone(home, target, out):
        yield home


@contextmanager
def _at_once(home: Path, target: Path, out: Path, publish: Callable[[], None]) -> Iterator[None]:
    """Make the folder of a quick output for the block, and publish what is in it at the end."""
    hidden = new_output(home)
    try:
        with _faults_of(out):
            hidden.mkdir()
        yield
        with _faults_of(out):
            sync_tree(hidden)
            with uninterrupted():
                publish()
                _drop(home)  # with what an interrupted work has left: `out` is another thing now
        confirm(target, out)
    except BaseException as error:
        with uninterrupted():
            shutil.rmtree(hidden, ignore_errors=True)
        _promise_nothing(error)
        raise


def _target(out: Path) -> Path:
    """Where `out` really is: links are followed, so that what they point to is replaced."""
    target = Path(os.path.realpath(out))
    if not target.name:
        raise InputError(f"{out} is no place for an output: choose another one")
    with storage_faults(f"write {out}"), suppress(FileNotFoundError):
        target.lstat()  # a name that is too long, or in a place that is none
    return target


def _refuse_folder(target: Path, out: Path, force: bool, inputs: Iterable[Path]) -> None:
    _refuse_inputs(inputs, target, out, "holds")
    if os.path.exists(target):
        if not os.path.isdir(target):
            raise InputError(f"{out} is not a folder: choose another output folder")
        if not force:
            raise InputError(f"{out} exists: choose another folder or pass --force")
        if os.path.ismount(target):
            raise InputError(f"{out} is where a disk is mounted: choose a folder in it")
        if Path.cwd().is_relative_to(target):
            raise InputError(f"{out} holds the current folder: choose another output folder")


def _refuse_file(target: Path, path: Path, force: bool, inputs: Iterable[Path]) -> None:
    _refuse_inputs(inputs, target, path, "is")
    if os.path.exists(target):
        if not os.path.isfile(target):
            raise InputError(f"{path} is not a regular file: choose another output file")
        if not force:
            raise InputError(f"{path} exists: choose another file or pass --force")


def _refuse_inputs(inputs: Iterable[Path], target: Path, out: Path, verb: str) -> None:
    for path in inputs:
        if Path(os.path.realpath(path)).is_relative_to(target):
            raise InputError(f"{out} {verb} the input {path}: choose another output")


@contextmanager
def _faults_of(out: Path) -> Iterator[None]:
    """The operating system's refusals as errors of the user's or the disk's, about `out`."""
    with storage_faults(f"write {out}"):
        try:
            yield
        except FileExistsError as error:
            raise UnfinishedError(f"{out} has appeared meanwhile: move it away") from error


@contextmanager
def _parents_of(target: Path, out: Path) -> Iterator[None]:
    """Create the missing folders above `target`; remove them again if the block fails."""
    missing = [parent for parent in target.parents if not os.path.lexists(parent)]
    try:
        with _faults_of(out):
            for parent in reversed(missing):
                parent.mkdir(exist_ok=True)
        yield
    except BaseException:
        with uninterrupted():
            for parent in missing:
                with suppress(OSError):  # somebody else's by now, or never made
                    parent.rmdir()
        raise


def kept_journal(out: Path) -> Path:
    """Where the journal of a work on `out` is, if an interrupted one has left any."""
    return journal_of(workplace(_target(out)))


def _drop(home: Path) -> None:
    """Leave nothing to be resumed, nor anything else."""
    with uninterrupted(), suppress(OSError):
        clear(home)


def _promise_nothing(error: BaseException) -> None:
    """Take back what a work within this one has said: what it has kept is gone."""
    if hasattr(error, "__notes__"):
        error.__notes__ = [note for note in error.__notes__ if not note.startswith(_KEPT)]


def _outlived(error: BaseException) -> bool:
    """Whether the work done until `error` is worth keeping: only its input can be wrong with it."""
    return isinstance(error, UnfinishedError) or not isinstance(error, InputError)


@contextmanager
def _set_aside(path: Path) -> Iterator[None]:
    """Give a file, if there is one, another name for good; its own again if the block fails."""
    aside = path.with_suffix(".done")
    with suppress(FileNotFoundError):
        path.replace(aside)
    try:
        yield
    except BaseException:
        with suppress(FileNotFoundError):
            aside.replace(path)
        raise


def _advice(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt | SystemExit):
        cure = "run the same command with --resume to go on"
    else:
        cure = "mend the cause, then run the same command with --resume"
    return f"{_KEPT}: {cure}"
