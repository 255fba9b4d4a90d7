"""Let what is complete take its final name by one rename, once its bytes have reached the disk."""

import ctypes
import errno
import os
from pathlib import Path

from recall_jax.errors import StorageError

# linux/fs.h and fcntl.h, for renameat2
_RENAME_NOREPLACE, _RENAME_EXCHANGE, _AT_FDCWD = 1, 2, -100
_NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


def publish_folder(source: Path, target: Path, *, replace: bool) -> None:
    """Rename a folder that `sync_tree` has seen; `source` is gone, or what `target` was before.

    FileExistsError where there is a `target` that is not to be replaced. `confirm` comes next.
    """
    if replace and os.path.exists(target):
        _exchange(source, target)
    else:
        _rename_to_new(source, target)


def publish_file(source: Path, target: Path, *, replace: bool) -> None:
    """Rename a file that `sync_tree` has seen. FileExistsError as for `publish_folder`."""
    if replace:
        source.replace(target)
    else:
        _rename_to_new(source, target)


def confirm(target: Path, out: Path) -> None:
    """Let the new name of what was published, `out` to the user, reach the disk.

    Raises StorageError where the disk does not say so: what is written is there all the same.
    """
    try:
        _sync_names(target.parent)
    except OSError as error:
        raise StorageError(
            f"{out} is there and complete, but the disk did not confirm it "
            f"({error.strerror or error}): see that it still is after a restart"
        ) from error


def sync_tree(folder: Path) -> None:
    """Let everything in a folder reach the disk."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(root, name))
        _sync_names(Path(root))


def mend(target: Path, source: Path) -> None:
    """Give `target` back its name where a crash came between the renames of an exchange."""
    aside = _aside(source)
    if os.path.lexists(aside) and not os.path.lexists(target):
        aside.rename(target)


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
    aside = _aside(source)
    target.rename(aside)
    try:
        source.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    aside.rename(source)


def _aside(source: Path) -> Path:
    """Where `target` is between two renames, and where `mend` finds it."""
    return source.with_name("old")


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


def _sync(path: Path) -> None:
    """Let the bytes of a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """As `_sync`; there are file systems that know it of files alone."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
