"""Rename a complete output to its final name, once its bytes have reached the disk."""

import ctypes
import errno
import os
from pathlib import Path

from recall_jax.errors import StorageError

# linux/fs.h and fcntl.h, for renameat2
_RENAME_NOREPLACE, _RENAME_EXCHANGE, _AT_FDCWD = 1, 2, -100
_NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


def publish_folder(source: Path, target: Path, *, replace: bool) -> None:
    """Rename a folder that was synced by `sync_tree`; a replaced `target` is left at `source`.

    Raises FileExistsError if there is a `target` and `replace` is false. Call `confirm` next.
    """
    if replace and os.path.exists(target):
        _exchange(source, target)
    else:
        _rename_to_new(source, target)


def publish_file(source: Path, target: Path, *, replace: bool) -> None:
    """Rename a file that was synced by `sync_tree`. FileExistsError as for `publish_folder`."""
    if replace:
        source.replace(target)
    else:
        _rename_to_new(source, target)


def confirm(target: Path, out: Path) -> None:
    """Sync the new name of a published output to the disk; errors call it `out`.

    Raises StorageError if the disk does not confirm it; the output is nevertheless in place.
    """
    try:
        _sync_names(target.parent)
    except OSError as error:
        raise StorageError(
            f"{out} is there and complete, but the disk did not confirm it "
            f"({error.strerror or error}): check that it still is after a restart"
        ) from error


def sync_tree(folder: Path) -> None:
    """Sync every file and name in a folder to the disk."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(root, name))
        _sync_names(Path(root))


def repair(target: Path, source: Path) -> None:
    """Give `target` its name back if a crash came between the two renames of an exchange."""
    aside = _aside(source)
    if os.path.lexists(aside) and not os.path.lexists(target):
        aside.rename(target)


def _rename_to_new(source: Path, target: Path) -> None:
    """Rename without ever replacing anything; FileExistsError if `target` exists."""
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
    """Swap the names of two folders."""
    if _renameat2(source, target, _RENAME_EXCHANGE):
        return
    aside = _aside(source)
    target.rename(aside)
    try:
        source.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    aside.rename(source)


def _aside(source: Path) -> Path:
    """Return the path of `target` between the two renames, where `repair` finds it."""
    return source.with_name("old")


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Call Linux's renameat2; return False if the system or the file system lacks it."""
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


def _sync(path: Path) -> None:
    """Sync the bytes of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """Sync the names in a folder, unless the file system can only sync files."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
