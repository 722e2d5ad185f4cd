"""Files and folders that appear whole or not at all.

Everything is written beside its destination, flushed to disk, then renamed; a process killed at any moment
leaves nothing half-written under the destination's name, and at worst a stray `.tmp-*` beside it. A file is
replaced in one step. A folder is replaced in two renames, between which neither is there; what must never be
missing (checkpoints) therefore gets a new name each time.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vglann_fast.errors import VglannError

_ACTIONABLE = {
    errno.EFBIG: "larger than this file system or process may write; choose another output folder",
    errno.EIO: "the disk reports an error; choose another output folder",
    errno.ENOSPC: "the disk is full; free some space and run the command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the command again",
    errno.EACCES: "permission denied; choose another output folder",
    errno.EPERM: "permission denied; choose another output folder",
    errno.EROFS: "the file system is read-only; choose another output folder",
}


@contextmanager
def actionable_os_errors(path: Path) -> Iterator[None]:
    """Turn the operating-system errors a user can mend (disk full, no permission) into `VglannError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _ACTIONABLE:
            raise VglannError(f"{path}: {_ACTIONABLE[error.errno]}") from error
        raise


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; on a clean exit it replaces `path`, otherwise it is removed.

    Parent folders are created. Raises `VglannError` when the disk is full or not writable.
    """
    path = Path(path)
    with actionable_os_errors(path):
        _make_folder(path.parent)
        descriptor, name = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            fsync_path(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
            fsync_path(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on a clean exit it becomes `path`, replacing an older folder.

    Raises `VglannError` when the disk is full or not writable.
    """
    path = Path(path)
    with actionable_os_errors(path):
        _make_folder(path.parent)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=path.parent))
        try:
            yield temporary
            for entry in sorted(temporary.rglob("*")):
                fsync_path(entry)
            fsync_path(temporary)
            temporary.chmod(0o777 & ~_umask())
            _replace_dir(temporary, path)
            fsync_path(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace_dir(source: Path, destination: Path) -> None:
    # rename(2) refuses a destination that is a non-empty folder, so an older one is moved aside first.
    if not destination.exists():
        source.rename(destination)
        return
    aside = Path(tempfile.mkdtemp(prefix=".tmp-", dir=destination.parent))
    destination.rename(aside / "old")
    source.rename(destination)
    shutil.rmtree(aside)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VglannError(
            f"{path} cannot be made ({error.strerror}); choose another output folder"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
