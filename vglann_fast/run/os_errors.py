"""Errors of the operating system that are a matter of the machine, in words a user can act on."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vglann_fast.errors import VglannError
from vglann_fast.run.temporary import is_stray

_ELSEWHERE = "choose another output folder"
_PERMISSIONS = "permission denied; choose another folder, or see to its permissions"
_GONE = "the file system does not answer any more; mount it again, or choose another output folder"
_ACTIONABLE = {
    errno.EFBIG: f"larger than this file system or process may write; {_ELSEWHERE}",
    errno.EIO: f"the disk reports an error; {_ELSEWHERE}",
    errno.ENOSPC: "the disk is full; free some space and run the command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the command again",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: f"the file system is read-only; {_ELSEWHERE}",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
    errno.EILSEQ: "this file system cannot store the name; choose another one",
    errno.ELOOP: "a symbolic link that cannot be followed; remove the link, or choose another path",
    errno.ENOTDIR: f"it, or a part of its path, is not a folder; {_ELSEWHERE}",
    errno.EISDIR: "a folder is in the way; remove it, or choose another path",
    errno.EBUSY: f"in use by the system, for example as a mount point; {_ELSEWHERE}",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n) and run the command again",
    errno.ENFILE: "too many open files on this machine; close some programs and run the command again",
    errno.ESTALE: _GONE,
    errno.ENOTCONN: _GONE,
    errno.EHOSTDOWN: _GONE,
    errno.ETIMEDOUT: _GONE,
    errno.ENXIO: _GONE,
    errno.ENODEV: _GONE,
}


def actionable(error: OSError, path: object = None) -> str | None:
    """Say what a user can do about an error of the operating system, or None where the error is not known.

    path: what the message names. Default: the file that the error names.
    """
    about = error.filename if path is None else path
    text = _ACTIONABLE.get(error.errno or 0)
    return text and (text if about is None else f"{about}: {text}")


def described(error: OSError, path: object) -> str:
    """Say what went wrong while `path` was written, for an error of any kind."""
    return actionable(error, path) or f"{path}: {error.strerror or error}; {_ELSEWHERE}"


@contextmanager
def actionable_os_errors(path: object, *own: Path) -> Iterator[None]:
    """Turn an error of the operating system into a `VglannError` about `path`.

    Known errors are turned whatever they are about. So are all errors about a temporary folder, about a path of
    `own`, what is in it and the folder around it. Others are raised as they are.
    """
    try:
        yield
    except OSError as error:
        if actionable(error) or _is_about(error.filename, own):
            raise VglannError(described(error, path)) from error
        raise


def _is_about(file: object, own: Sequence[Path]) -> bool:
    if not isinstance(file, str | bytes):
        return False
    path = Path(os.fsdecode(file))
    return any(map(is_stray, path.parts)) or any(
        path.is_relative_to(place) or path == place.parent for place in own
    )
