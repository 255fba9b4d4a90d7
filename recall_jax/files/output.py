"""Make outputs that are absent or complete, never partial.

An output is written to a hidden folder next to it, `.NAME.recall-work`, and renamed in one step
once all of it has reached the disk. A quick output is removed on any error, interrupts included. A
long work has a journal: it survives a disk failure, a signal or a kill, and can be resumed. What a
kill leaves of either is removed by the next run of any command with the same output.
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
    clear,
    is_resumable,
    journal_path,
    locked,
    long_output,
    quick_output,
    workplace,
)

_KEPT = "what is done is kept"


@dataclass(frozen=True)
class UnfinishedOutput:
    """Hold an unfinished output: the folder that becomes it, and the journal of finished steps.

    The caller writes the journal; a work with no journal, or an empty one, is not resumed.
    """

    folder: Path
    journal: Path
    discarded: bool = False  # whether the remains of an interrupted work were removed

    @property
    def scratch(self) -> Path:
        """Return the folder for temporary files, which is removed with the work."""
        return self.folder.with_name("scratch")


@contextmanager
def output_folder(out: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block ends without an error.

    With `force`, an existing `out` is replaced in one step and then removed. Raises InputError,
    before anything is done, if `out` exists without `force`, is a file, contains one of `inputs` or
    the current folder, cannot be created, or is being written by a living process; StorageError if
    the disk fails.
    """
    target = _target(out)
    with _place_of(target, out, partial(_refuse_folder, target, out, force, inputs)) as home:
        hidden = quick_output(home)
        publish = partial(publish_folder, hidden, target, replace=force)
        with _at_once(home, target, out, publish):
            yield hidden


@contextmanager
def work_folder(
    out: Path, *, force: bool = False, resume: bool = False, inputs: Iterable[Path] = ()
) -> Iterator[UnfinishedOutput]:
    """Yield the folder and journal of a long work; the folder becomes `out` when the block ends.

    With `resume`, the remains of an interrupted work are taken up, else they are removed. An
    InputError removes them too. After a kill or any other exception (UnfinishedError, a signal, an
    internal error) they are kept for the next resume if the journal, or that of a work inside this
    one, has a record; the exception then gets a note that says so. Raises InputError as
    `output_folder` does.
    """
    target = _target(out)
    with _place_of(target, out, partial(_refuse_folder, target, out, force, inputs)) as home:
        found = is_resumable(home)
        work = UnfinishedOutput(
            long_output(home), journal_path(home), discarded=found and not resume
        )
        published = False
        try:
            with _faults_of(out):
                if not (resume and found):
                    clear(home)
                work.folder.mkdir(exist_ok=True)
            yield work
            with _faults_of(out):
                sync_tree(work.folder)
                # Set aside, because `folder` is the old `out` once the two are exchanged.
                with uninterrupted(), _set_aside(work.journal):
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
    """Yield an empty file that becomes `path` when the block ends without an error.

    The file has the same name. Raises InputError as `output_folder` does.
    """
    target = _target(path)
    with _place_of(target, path, partial(_refuse_file, target, path, force, inputs)) as home:
        hidden = quick_output(home) / target.name
        publish = partial(publish_file, hidden, target, replace=force)
        with _at_once(home, target, path, publish):
            with _faults_of(path):
                hidden.touch()
            yield hidden


@contextmanager
def _place_of(target: Path, out: Path, refuse: Callable[[], None]) -> Iterator[Path]:
    """Yield the locked work folder of an output, unless `refuse` raises."""
    home = workplace(target)
    if os.path.isdir(home):  # a run was killed, perhaps between publishing and cleaning up
        with suppress(InputError), locked(home, target, out):
            pass
    refuse()
    with _parents_of(target, out), locked(home, target, out):
        yield home


@contextmanager
def _at_once(home: Path, target: Path, out: Path, publish: Callable[[], None]) -> Iterator[None]:
    """Create the folder of a quick output, and publish its content when the block ends."""
    hidden = quick_output(home)
    try:
        with _faults_of(out):
            hidden.mkdir()
        yield
        with _faults_of(out):
            sync_tree(hidden)
            with uninterrupted():
                publish()
                # Removes also an interrupted work: `out` is a different output now.
                _drop(home)
        confirm(target, out)
    except BaseException as error:
        with uninterrupted():
            shutil.rmtree(hidden, ignore_errors=True)
        _promise_nothing(error)
        raise


def _target(out: Path) -> Path:
    """Return the real path of `out`, so that the target of a link is replaced, not the link."""
    target = Path(os.path.realpath(out))
    if not target.name:
        raise InputError(f"{out} is no place for an output: choose another one")
    with storage_faults(f"write {out}"), suppress(FileNotFoundError):
        target.lstat()  # raises for a name that is too long, or inside of a file
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
    """Turn an OSError into an InputError, StorageError or UnfinishedError about `out`."""
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
                with suppress(OSError):  # in use by someone else, or never made
                    parent.rmdir()
        raise


def kept_journal(out: Path) -> Path:
    """Return the path of the journal that an interrupted work on `out` may have left."""
    return journal_path(workplace(_target(out)))


def _drop(home: Path) -> None:
    """Remove everything in the work folder, so that nothing can be resumed."""
    with uninterrupted(), suppress(OSError):
        clear(home)


def _promise_nothing(error: BaseException) -> None:
    """Remove the note by which an inner work said that its results are kept: they are gone."""
    if hasattr(error, "__notes__"):
        error.__notes__ = [note for note in error.__notes__ if not note.startswith(_KEPT)]


def _outlived(error: BaseException) -> bool:
    """Return whether the work done before `error` is worth keeping, which InputError denies."""
    return isinstance(error, UnfinishedError) or not isinstance(error, InputError)


@contextmanager
def _set_aside(path: Path) -> Iterator[None]:
    """Rename a file, if it exists; undo that if the block fails."""
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
        cure = "fix the cause, then run the same command with --resume"
    return f"{_KEPT}: {cure}"
