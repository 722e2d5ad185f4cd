"""Files and folders that appear whole or not at all.

Everything is written beside its destination, flushed to disk, then renamed; a process killed at any moment
leaves nothing half-written under the destination's name, and at worst a stray `.tmp-*` beside it (see
`remove_strays`). A file is replaced in one step. A folder is replaced in two renames, between which neither is
there; what must never be missing (checkpoints) therefore gets a new name each time.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vglann_fast.errors import VglannError

if TYPE_CHECKING:
    from torch import Tensor

_TEMPORARY = ".tmp-"
_ACTIONABLE = {
    errno.EFBIG: "larger than this file system or process may write; choose another output folder",
    errno.EIO: "the disk reports an error; choose another output folder",
    errno.ENOSPC: "the disk is full; free some space and run the command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the command again",
    errno.EACCES: "permission denied; choose another folder, or see to its permissions",
    errno.EPERM: "permission denied; choose another folder, or see to its permissions",
    errno.EROFS: "the file system is read-only; choose another output folder",
}


def actionable(error: OSError, path: object = None) -> str | None:
    """What to tell a user of an error of the operating system, or None where he can do nothing about it.

    path: what it is about; default the file the error names.
    """
    about = error.filename if path is None else path
    text = _ACTIONABLE.get(error.errno or 0)
    return text and (text if about is None else f"{about}: {text}")


@contextmanager
def actionable_os_errors(path: Path) -> Iterator[None]:
    """Turn the operating-system errors a user can mend (disk full, no permission) into `VglannError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _ACTIONABLE:
            raise VglannError(actionable(error, path)) from error
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
        make_folder(path.parent)
        descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
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
        make_folder(path.parent)
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=path.parent))
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
    aside = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=destination.parent))
    destination.rename(aside / "old")
    source.rename(destination)
    shutil.rmtree(aside)


def is_stray(path: Path) -> bool:
    """Whether this is a temporary file or folder of `atomic_file` or `atomic_dir`."""
    return path.name.startswith(_TEMPORARY)


def remove_strays(folder: Path) -> None:
    """Remove what processes that were killed left in `folder`. Only for one who knows that no other writes there."""
    for stray in folder.glob(f"{_TEMPORARY}*"):
        if stray.is_dir() and not stray.is_symlink():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            stray.unlink(missing_ok=True)


def remove_dir(path: Path) -> None:
    """Remove a folder: a process killed meanwhile leaves a stray, never a part under the folder's name."""
    aside = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=path.parent))
    path.rename(aside / "old")
    shutil.rmtree(aside)


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Raises `VglannError` where that cannot be."""
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


def append_line(file: Path, value: Mapping[str, Any]) -> None:
    """Add a line to a file that has one object a line. One that was torn by a crash ends there and takes no other."""
    with actionable_os_errors(file), file.open("ab+") as lines:
        size = lines.seek(0, os.SEEK_END)
        lines.seek(max(0, size - 1))
        torn = lines.read() not in (b"", b"\n")
        lines.write(b"\n" * torn + json.dumps(value).encode() + b"\n")


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file that has one a line; other lines, torn by a crash, are left out."""
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def save_tensors(tensors: Mapping[str, "Tensor"], path: Path) -> None:
    """Write tensors, on any device and in any memory format, as safetensors.

    The library's own writer reports a full disk as an error of its own kind; a plain write gives an `OSError`.
    """
    from safetensors.torch import save

    path.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file for reading. Raises `OSError` unless it is a regular file: reading a pipe would block for ever."""
    # Without O_NONBLOCK opening a pipe waits for a writer.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises `OSError` as `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def read_json(path: Path) -> Any:
    """Read JSON. Raises `VglannError` that names the file when it is missing, not a regular file or not valid."""
    try:
        with open_regular(path) as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise VglannError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:  # not text, not JSON, or nested beyond all bounds
        text = error.strerror if isinstance(error, OSError) else error
        raise VglannError(f"{path} is not valid JSON: {text}") from error
