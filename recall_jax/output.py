"""Outputs that are absent or complete, never half.

What is written goes to a hidden sibling (`.NAME.recall-<random>`) and takes its final name by one
rename when everything has reached the disk; on any error, interrupts included, it is removed.
"""

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from recall_jax.errors import InputError

# linux/fs.h and fcntl.h, for renameat2
_RENAME_NOREPLACE, _RENAME_EXCHANGE, _AT_FDCWD = 1, 2, -100
_NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


@contextmanager
def output_folder(out: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block ends without error.

    With `force`, an `out` that exists is replaced in one step and then removed. InputError, before
    anything is done, if `out` exists without `force`, is a file, holds one of `inputs` or the
    current folder, or cannot be created.
    """
    target = _target(out)
    _refuse_inputs(inputs, target, out, "holds")
    if os.path.exists(target):
        if not os.path.isdir(target):
            raise InputError(f"{out} is not a folder: choose another output folder")
        if not force:
            raise InputError(f"{out} exists: choose another folder or pass --force")
        if Path.cwd().is_relative_to(target):
            raise InputError(f"{out} holds the current folder: choose another output folder")
    with _parents_of(target, out):
        hidden = target.with_name(f".{target.name}.recall-{secrets.token_hex(4)}")
        try:
            with _faults_of(out):
                hidden.mkdir()
            yield hidden
            with _faults_of(out):
                _sync_tree(hidden)
                if force and os.path.exists(target):
                    _exchange(hidden, target)
                else:
                    _rename_to_new(hidden, target)
                _sync(target.parent)
        finally:
            # by now absent, unfinished, or what `out` was before
            shutil.rmtree(hidden, ignore_errors=True)


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
                _sync(hidden)
                if force:
                    hidden.replace(target)
                else:
                    _rename_to_new(hidden, target)
                _sync(target.parent)
        finally:
            with suppress(OSError):
                hidden.unlink()


def _refuse_inputs(inputs: Iterable[Path], target: Path, out: Path, verb: str) -> None:
    for path in inputs:
        if Path(os.path.realpath(path)).is_relative_to(target):
            raise InputError(f"{out} {verb} the input {path}: choose another output")


def _target(out: Path) -> Path:
    """Where `out` really is: links are followed, so that what they point to is replaced."""
    target = Path(os.path.realpath(out))
    if not target.name:
        raise InputError(f"{out} is no place for an output: choose another one")
    return target


@contextmanager
def _faults_of(out: Path) -> Iterator[None]:
    """The operating system's refusals as errors of the user's, about `out`."""
    try:
        yield
    except FileExistsError as error:
        raise InputError(f"{out} has appeared meanwhile: choose another output") from error
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from error


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


def _rename_to_new(source: Path, target: Path) -> None:
    """Rename, never onto something: FileExistsError."""
    if _renameat2(source, target, _RENAME_NOREPLACE):
        return
    if source.is_file():
        os.link(source, target)
        source.unlink()
    else:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)  # fails by itself on a folder that is not empty


def _exchange(source: Path, target: Path) -> None:
    """Let two folders swap their names."""
    if _renameat2(source, target, _RENAME_EXCHANGE):
        return
    aside = source.with_name(f"{source.name}-old")
    target.rename(aside)
    try:
        source.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    aside.rename(source)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Linux's renameat2; False where the system or the file system does not have it."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(target))


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    """Let the bytes of a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
