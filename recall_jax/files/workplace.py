"""Manage the hidden folder next to an output in which the output is made, and its lock.

The folder `.NAME.recall-work` contains:

- `lock`, which the system releases when its process dies, so that its holder is the only writer;
- `journal.jsonl`, `out` and `scratch` of a long work, which can be resumed;
- `new` of a quick output, which starts over;
- `old`, the replaced output, for a moment where the file system cannot exchange two names.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOLCK, ENOSYS, ENOTSUP, EOPNOTSUPP
from io import FileIO
from pathlib import Path

from recall_jax.errors import InputError, storage_faults
from recall_jax.files.interruption import uninterrupted
from recall_jax.files.publish import repair

_SUFFIX, _LOCK, _JOURNAL = ".recall-work", "lock", "journal.jsonl"
_LONGEST = 255  # bytes of a file name
_NO_LOCKS = {ENOSYS, ENOLCK, ENOTSUP, EOPNOTSUPP}


def workplace(target: Path) -> Path:
    """Return the hidden folder next to an output, whose name derives from the output's."""
    name = f".{target.name}{_SUFFIX}"
    if len(encoded := os.fsencode(name)) > _LONGEST:
        name = f".{hashlib.sha256(encoded).hexdigest()}{_SUFFIX}"
    return target.with_name(name)


def journal_path(home: Path) -> Path:
    """Return the path of the journal of a long work."""
    return home / _JOURNAL


def long_output(home: Path) -> Path:
    """Return the folder that a long work fills and that becomes the output."""
    return home / "out"


def quick_output(home: Path) -> Path:
    """Return the folder of a quick output: the output itself, or the parent of a file."""
    return home / "new"


def is_resumable(home: Path) -> bool:
    """Return whether a long work, or one inside it, has written to its journal."""
    within = long_output(home).rglob(f".*{_SUFFIX}/{_JOURNAL}")
    return any(_has_content(path) for path in (journal_path(home), *within))


@contextmanager
def locked(home: Path, target: Path, out: Path) -> Iterator[None]:
    """Hold the lock in `home`, created if missing, and remove what a killed run has left there.

    The folder is removed at the end, unless its content can be resumed. Raises InputError if a
    living process holds the lock.
    """
    lock = None
    try:
        with uninterrupted():
            lock = _locked(home, out)
            with storage_faults(f"write {out}"):
                repair(target, long_output(home))
                _remove_tree(quick_output(home))
                _remove_tree(home / "old")
        yield
    finally:
        if lock is not None:
            with uninterrupted(), lock:
                if not is_resumable(home):
                    _remove(home)


def clear(home: Path) -> None:
    """Remove everything that another process has left, but not the lock held by this one."""
    for path in home.iterdir():
        if path.name == _LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove(home: Path) -> None:
    """Remove everything, the lock last, so that its next holder finds an empty folder or none."""
    with suppress(OSError):
        clear(home)
    with suppress(OSError):
        (home / _LOCK).unlink()
    with suppress(OSError):  # another process is using it already
        home.rmdir()


def _remove_tree(folder: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _has_content(path: Path) -> bool:
    with suppress(OSError):
        return path.stat().st_size > 0
    return False


def _locked(home: Path, out: Path) -> FileIO:
    if os.path.islink(home):  # not made by us: its target may not be cleared
        raise InputError(f"{home} is a link: remove it or choose another output folder")
    while True:
        with storage_faults(f"write {out}"):
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
            try:
                _take(lock, out)
                if _is_at(lock, home / _LOCK):  # else removed by a process that has just finished
                    with suppress(OSError):  # it only informs others
                        lock.truncate(0)
                        lock.write(f"{os.getpid()}\n".encode())
                    return lock
            except BaseException:
                lock.close()
                raise
            lock.close()


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
            f"another run is writing {out}{process}: wait for it or choose another output"
        ) from error
    except OSError as error:
        # some network file systems have no locks: there, two runs at once go unnoticed
        if error.errno not in _NO_LOCKS:
            raise


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
