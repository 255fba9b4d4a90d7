"""The hidden folder beside an output in which it is made: named after it, and locked.

What lies in `.NAME.recall-work`:

- `lock`, which the system frees when its process dies: whoever takes it knows that nobody is there;
- `journal.jsonl`, `out` and `scratch` of a long work, which can be resumed;
- `new` of a quick output, which is begun again;
- `old`, what an output was, for a moment where the file system cannot exchange two names.
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
from recall_jax.files.publish import mend

_SUFFIX, _LOCK, _JOURNAL = ".recall-work", "lock", "journal.jsonl"
_LONGEST = 255  # bytes of a name in a folder
_NO_LOCKS = {ENOSYS, ENOLCK, ENOTSUP, EOPNOTSUPP}


def workplace(target: Path) -> Path:
    """The hidden sibling of an output, found again by its name."""
    name = f".{target.name}{_SUFFIX}"
    if len(encoded := os.fsencode(name)) > _LONGEST:
        name = f".{hashlib.sha256(encoded).hexdigest()}{_SUFFIX}"
    return target.with_name(name)


def journal_of(home: Path) -> Path:
    """Where the journal of a long work is."""
    return home / _JOURNAL


def long_work(home: Path) -> Path:
    """The folder that a long work fills, and that becomes the output."""
    return home / "out"


def new_output(home: Path) -> Path:
    """The folder of a quick output, or the one that the file is in."""
    return home / "new"


def is_resumable(home: Path) -> bool:
    """Whether a long work has noted anything, or one that is done within it."""
    within = long_work(home).rglob(f".*{_SUFFIX}/{_JOURNAL}")
    return any(_has_content(path) for path in (journal_of(home), *within))


@contextmanager
def alone(home: Path, target: Path, out: Path) -> Iterator[None]:
    """Hold the lock in `home`, created where missing, and sweep what a kill has left there.

    At the end it is removed, unless what is in it can be resumed. InputError if a living process
    has the lock.
    """
    lock = None
    try:
        with uninterrupted():
            lock = _locked(home, out)
            with storage_faults(f"write {out}"):
                mend(target, long_work(home))
                _remove_tree(new_output(home))
                _remove_tree(home / "old")
        yield
    finally:
        if lock is not None:
            with uninterrupted(), lock:
                if not is_resumable(home):
                    _remove(home)


def clear(home: Path) -> None:
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
        clear(home)
    with suppress(OSError):
        (home / _LOCK).unlink()
    with suppress(OSError):  # another process has come in already
        home.rmdir()


def _remove_tree(folder: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _has_content(path: Path) -> bool:
    with suppress(OSError):
        return path.stat().st_size > 0
    return False


def _locked(home: Path, out: Path) -> FileIO:
    if os.path.islink(home):  # of somebody else's making: what it points to is not ours to clear
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
                if _is_at(lock, home / _LOCK):  # else that of a process that has just finished
                    with suppress(OSError):  # only told to others
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
        # some network file systems have no locks: there, two at once are not told apart
        if error.errno not in _NO_LOCKS:
            raise


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
