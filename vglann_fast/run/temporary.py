"""Temporary folders beside what they become, and what a file system may or may not be able to do.

A temporary folder is called `.tmp-vglann-XXXXXXXX` and holds a file `lock` that its process keeps locked, so the
lock goes with the process however that ends. `remove_strays` removes the folders of processes that are gone and
leaves the others alone, also on a disk that several machines share. Where a file system has no locks nothing is
removed. Folders are made with the usual permissions, not with mkdtemp's, so that the umask, default ACLs and the
setgid bit of the folder around them hold for what is moved out of them.
"""

import errno
import fcntl
import gc
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vglann_fast.errors import VglannError

_PREFIX = ".tmp-vglann-"
_LOCK = "lock"
_ATTEMPTS = 100
# What fsync answers where a file system has nothing to flush, and opening where a folder may be written but not read.
_NO_FSYNC = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
}


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Make a folder in `parent` for the block and remove it with all it holds afterwards; strays there go, too."""
    remove_strays(parent)
    folder, lock = _new_locked_folder(parent)
    try:
        yield folder
    finally:
        os.close(lock)
        _remove(folder, _remove_tree)


def _new_locked_folder(parent: Path) -> tuple[Path, int]:
    for _ in range(_ATTEMPTS):
        folder = parent / f"{_PREFIX}{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            lock = _open_lock(folder)
        except OSError as error:
            with suppress(OSError):
                folder.rmdir()
            if isinstance(error, FileNotFoundError):  # another process took the folder for a stray
                continue
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        except OSError:  # a file system without locks
            return folder, lock
        if os.path.lexists(folder / _LOCK):
            return folder, lock
        os.close(lock)
    raise VglannError(f"{parent}: no temporary folder can be made in it; choose another output folder")


def _open_lock(folder: Path) -> int:
    return os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def is_stray(name: str) -> bool:
    """Return True if this is the name of a temporary folder."""
    return name.startswith(_PREFIX)


def remove_strays(folder: Path, *, replaced: bool = False) -> None:
    """Remove what processes that are gone have left in `folder`, as far as that is possible.

    A temporary folder that holds the older files of a folder, since its process ended while it replaced them, is kept
    unless they have been `replaced` since.
    """
    try:
        names = [entry.name for entry in os.scandir(folder) if is_stray(entry.name)]
    except OSError:
        return
    for stray in (folder / name for name in names):
        try:
            if not stat.S_ISDIR(stray.lstat().st_mode):
                continue
            if not replaced and os.path.isdir(stray / "old"):
                continue
            lock = _open_lock(stray)
        except OSError:  # another user's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(stray, ignore_errors=True)
        except OSError:  # its process lives, or this file system has no locks
            continue
        finally:
            os.close(lock)
        # Without the lock only an empty folder may go: another process may have locked this one meanwhile.
        _remove(stray, _remove_empty)


def _remove_tree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _remove(folder: Path, attempt: Callable[[Path], None]) -> None:
    """Remove a folder by `attempt`, as far as that is possible.

    On NFS and FUSE a file that is still open or mapped gets another name in place of being removed, and its folder
    can only be removed a moment after the last of them is closed.
    """
    for pause in (0.0, 0.1, 0.4):
        if pause:
            gc.collect()
            time.sleep(pause)
        attempt(folder)
        if not os.path.lexists(folder):
            return


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk, where the file system can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise OSError(error.errno, error.strerror, str(path)) from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents, where links lead. Raises `VglannError` where that is not possible."""
    try:
        Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VglannError(
            f"{path} cannot be made ({error.strerror}); choose another output folder"
        ) from error


@contextmanager
def folder_for(path: Path) -> Iterator[None]:
    """Make the folder `path` and its parents; those that were not there are removed if the block fails."""
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    make_folder(path)
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise
