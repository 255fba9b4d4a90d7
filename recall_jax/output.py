"""Outputs that are absent or complete, never half.

What is written goes to a hidden sibling and takes its final name by one rename when everything has
reached the disk. The sibling of a quick output (`.NAME.recall-<random>`) is removed on any error,
interrupts included. That of a long work (`.NAME.recall-work`) has a lock and a journal: it outlives
a failing disk, a signal or a kill, and the work can be resumed.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from recall_jax.errors import InputError, UnfinishedError, storage_faults
from recall_jax.publish import publish_file, publish_folder, sync_tree

_JOURNAL, _LOCK = "journal.jsonl", "lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


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
    current folder, or cannot be created; StorageError if the disk fails.
    """
    target = _target(out)
    _refuse_folder(target, out, force, inputs)
    with _parents_of(target, out):
        hidden = target.with_name(f".{target.name}.recall-{secrets.token_hex(4)}")
        try:
            with _faults_of(out):
                hidden.mkdir()
            yield hidden
            with _faults_of(out):
                sync_tree(hidden)
                publish_folder(hidden, target, replace=force)
        finally:
            # by now absent, unfinished, or what `out` was before
            shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def work_folder(
    out: Path, *, force: bool = False, resume: bool = False, inputs: Iterable[Path] = ()
) -> Iterator[Work]:
    """Yield the place of a long work whose folder becomes `out` when the block ends without error.

    What an interrupted work has left is taken up with `resume`, else removed. An InputError removes
    it too; a kill and every other exception (UnfinishedError, a signal, a fault of ours) leaves it
    for the next resume, and the exception gets a note that says so. InputError as for
    `output_folder`, and while another process works on the same `out`.
    """
    target = _target(out)
    home = _home(target)
    if os.path.isdir(home):  # perhaps of one that was killed between publishing and removing
        with suppress(InputError), _alone(home, out):
            if not _is_resumable(home):
                _remove(home)
    _refuse_folder(target, out, force, inputs)
    with _parents_of(target, out), _alone(home, out):
        found = _is_resumable(home)
        work = Work(home / "out", home / _JOURNAL, discarded=found and not resume)
        try:
            with _faults_of(out):
                if not (resume and found):
                    _clear(home)
                work.folder.mkdir(exist_ok=True)
            yield work
            with _faults_of(out):
                sync_tree(work.folder)
                with _set_aside(work.journal):  # `folder` is soon the old `out`
                    publish_folder(work.folder, target, replace=force)
        except BaseException as error:
            if _outlived(error) and _is_resumable(home):
                error.add_note(_advice(error))
            else:
                _remove(home)
            raise
        _remove(home)


@contextmanager
def output_file(path: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield an empty file, of the same suffix, that becomes `path` when the block ends well.

    InputError as for `output_folder`.
    """
    target = _target(path)
    _refuse_inputs(inputs, target, path, "is")
    if os.path.exists(target):
        if not os.path.isfile(target):
            raise InputError(f"{path} is not a regular file: choose another output file")
        if not force:
            raise InputError(f"{path} exists: choose another file or pass --force")
    with _parents_of(target, path):
        hidden = target.with_name(f".{target.stem}.recall-{secrets.token_hex(4)}{target.suffix}")
        try:
            with _faults_of(path):
                hidden.touch(exist_ok=False)
            yield hidden
            with _faults_of(path):
                publish_file(hidden, target, replace=force)
        finally:
            with suppress(OSError):
                hidden.unlink()


def _target(out: Path) -> Path:
    """Where `out` really is: links are followed, so that what they point to is replaced."""
    target = Path(os.path.realpath(out))
    if not target.name:
        raise InputError(f"{out} is no place for an output: choose another one")
    return target


def _refuse_folder(target: Path, out: Path, force: bool, inputs: Iterable[Path]) -> None:
    _refuse_inputs(inputs, target, out, "holds")
    if os.path.exists(target):
        if not os.path.isdir(target):
            raise InputError(f"{out} is not a folder: choose another output folder")
        if not force:
            raise InputError(f"{out} exists: choose another folder or pass --force")
        if Path.cwd().is_relative_to(target):
            raise InputError(f"{out} holds the current folder: choose another output folder")


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
        for parent in missing:
            with suppress(OSError):  # somebody else's by now, or never made
                parent.rmdir()
        raise


def kept_journal(out: Path) -> Path:
    """Where the journal of a work on `out` is, if an interrupted one has left any."""
    return _home(_target(out)) / _JOURNAL


def _home(target: Path) -> Path:
    """The hidden sibling for a long work: found again by its name."""
    return target.with_name(f".{target.name}.recall-work")


def _is_resumable(home: Path) -> bool:
    with suppress(OSError):
        return (home / _JOURNAL).stat().st_size > 0
    return False


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
    return f"what is done is kept: {cure}"


def _clear(home: Path) -> None:
    """Remove whatever another process has left, but not the lock that is ours now."""
    for path in home.iterdir():
        if path.name == _LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove(home: Path) -> None:
    """Remove all, the lock last: who takes it sees a folder that is empty or not there."""
    with suppress(OSError):
        _clear(home)
    with suppress(OSError):
        (home / _LOCK).unlink()
    with suppress(OSError):  # another process has come in already
        home.rmdir()


@contextmanager
def _alone(home: Path, out: Path) -> Iterator[None]:
    """Hold the lock in `home`, created where missing; InputError if a living process has it.

    The system frees the lock of a process that dies.
    """
    if os.path.islink(home):  # of somebody else's making: what it points to is not ours to clear
        raise InputError(f"{home} is a link: remove it or choose another output folder")
    while True:
        with _faults_of(out):
            with suppress(FileExistsError):
                home.mkdir()
            try:
                lock = (home / _LOCK).open("ab+", buffering=0)
            except FileNotFoundError:  # removed by a process that has just finished
                continue
            except OSError:
                with suppress(OSError):
                    home.rmdir()
                raise
        with lock:
            with _faults_of(out):
                _take(lock, out)
            if _is_at(lock, home / _LOCK):  # else that of a process that has just finished
                with suppress(OSError):  # only told to others
                    lock.truncate(0)
                    lock.write(f"{os.getpid()}\n".encode())
                yield
                return


def _take(lock: FileIO, out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().decode().strip()
        process = f" (process {owner})" if owner else ""
        raise InputError(
            f"another run is writing {out}{process}: wait for it or choose another output folder"
        ) from error
    except OSError as error:
        # some network file systems have no locks: there, two at once are not told apart
        if error.errno not in _NO_LOCKS:
            raise


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
