"""Let what is complete take its final name by one rename, once its bytes have reached the disk."""

import ctypes
import errno
import os
import secrets
from pathlib import Path

# linux/fs.h and fcntl.h, for renameat2
_RENAME_NOREPLACE, _RENAME_EXCHANGE, _AT_FDCWD = 1, 2, -100
_NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


def publish_folder(source: Path, target: Path, *, replace: bool) -> None:
    """Rename a folder that `sync_tree` has seen; `source` is gone, or what `target` was before.

    FileExistsError where there is a `target` that is not to be replaced.
    """
    if replace and os.path.exists(target):
        _exchange(source, target)
    else:
        _rename_to_new(source, target)
    _sync(target.parent)


def publish_file(source: Path, target: Path, *, replace: bool) -> None:
    """Sync and rename a file. FileExistsError as for `publish_folder`."""
    _sync(source)
    if replace:
        source.replace(target)
    else:
        _rename_to_new(source, target)
    _sync(target.parent)


def sync_tree(folder: Path) -> None:
    """Let everything in a folder reach the disk."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


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
    # beside `target`, where a crash between the renames leaves it for its owner to find
    aside = target.with_name(f".{target.name}.recall-{secrets.token_hex(4)}-old")
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


def _sync(path: Path) -> None:
    """Let the bytes of a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
