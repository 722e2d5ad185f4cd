"""Files and folders that appear whole or not at all, on any file system and wherever the user points.

A file is written into a temporary folder beside it (`temporary.py`), flushed, and moved over its name in one step.

A folder (`atomic_dir`) has a *marker*: the file that readers look for first, such as index.json. The steps are

    1  links are resolved: what counts is where they lead
    2  if the folder is there, what is in it is noted, and the temporary folder is made inside: the same file system,
       and the folder around it need not be writable; otherwise the temporary folder is made beside it
    3  the caller fills temporary/new and may put scratch files beside that
    4  all of it is flushed to the disk
    5  where there was nothing, temporary/new is renamed, and that is all. If that fails, or the folder was there:
    6  its content is compared with what was noted; anything that has come or changed since is an error
    7  the older files of this program are moved to temporary/old, the marker first; all others stay where they are
    8  the new files are moved in, the marker last
    9  the temporary folder is removed, and the older files with it

A process killed in steps 7 or 8 leaves a folder without its marker, which readers take for a folder that is not
there, never one with old and new files; the same command again completes it (`content_of`). An error in steps 5 to 8
moves everything back and keeps the new files in a folder that the message names. What must never be missing
(checkpoints) gets a new name each time.

Flushing and removing what is not needed any more are done where the file system can.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from vglann_fast.errors import VglannError
from vglann_fast.run.os_errors import actionable_os_errors, described
from vglann_fast.run.temporary import flush, folder_for, is_stray, remove_strays, temporary_folder

# What file systems and desktops put into a folder by themselves.
_SYSTEM_FILES = ("lost+found", ".DS_Store", ".nfs*", ".fuse_hidden*")
# What renaming answers where it cannot be done at all: over two file systems, on object stores.
_NO_RENAME = {errno.EXDEV, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL}

# Name -> size and time of the last change.
Content = dict[str, tuple[int, int]]


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write a file to; on a clean exit it replaces `path`, otherwise it is removed.

    Parent folders are made. A link at `path` is replaced, not followed. Raises `VglannError` when the disk is full or
    not writable.
    """
    file = Path(path).absolute()
    with actionable_os_errors(path, file), folder_for(file.parent), temporary_folder(file.parent) as folder:
        temporary = folder / file.name
        yield temporary
        flush(temporary)
        try:
            temporary.replace(file)
        except OSError as error:
            # A file that is a mount point cannot be replaced, but written.
            if error.errno not in {*_NO_RENAME, errno.EBUSY} or file.is_symlink():
                raise
            shutil.copyfile(temporary, file)
            flush(file)
        flush(file.parent)


@contextmanager
def atomic_dir(path: str | Path, marker: str | None = None, others: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a folder to write files to; on a clean exit they are in the folder `path`, otherwise they are removed.

    See the top of this file.

    Args:
        path: destination. Parent folders are made.
        marker: name of the file without which readers take the folder for one that is not there.
        others: patterns of further names that an older folder of this kind may hold. Such files are removed; older
            files whose names the new ones have are replaced; all others stay.

    Raises `VglannError` when the disk is full or not writable, when `path` is not a folder, and when something came
    into it meanwhile; then what was written is kept beside it.
    """
    folder = Path(os.path.realpath(path))
    with actionable_os_errors(path, folder), folder_for(folder.parent):
        noted = _content(folder)
        home = folder.parent if noted is None else folder
        remove_strays(folder.parent)
        with temporary_folder(home) as temporary:
            new = temporary / "new"
            new.mkdir()
            yield new
            for entry in sorted(new.iterdir()):
                flush(entry)
            flush(new)
            try:
                _put_in_place(new, folder, noted, marker, others)
            except (OSError, _InTheWay) as error:
                reason = described(error, path) if isinstance(error, OSError) else f"{path}: {error}"
                raise VglannError(f"{reason}; what was written is kept as {_kept(new, home)}") from error
            flush(folder)
            flush(folder.parent)
        remove_strays(folder, replaced=True)


class _InTheWay(Exception):
    """Something came into the folder that was not there when the writing began."""


def _put_in_place(
    new: Path, folder: Path, noted: Content | None, marker: str | None, others: Sequence[str]
) -> None:
    """Move the files in `new` into `folder` in place of the older ones there. On an error all is as before."""
    made = False
    if noted is None:
        try:
            new.rename(folder)
            return
        except OSError:  # something is there now, or this file system cannot rename folders
            made = not folder.exists()
            folder.mkdir(exist_ok=True)
    try:
        there = _content(folder) or {}
        came = sorted(name for name, state in there.items() if (noted or {}).get(name) != state)
        if came:
            raise _InTheWay(f"{', '.join(came[:3])} came there while it was being written")
        names = [entry.name for entry in new.iterdir() if not is_stray(entry.name)]
        older = [name for name in there if name in (*names, marker) or _matches(name, others)]
        old = new.with_name("old")
        old.mkdir()
        out = [(folder / name, old / name) for name in sorted(older, key=lambda name: name != marker)]
        into = [(new / name, folder / name) for name in sorted(names, key=lambda name: name == marker)]
        _move_all(out + into)
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _move_all(moves: Sequence[tuple[Path, Path]]) -> None:
    """Move each of the files, or none of them."""
    begun = []
    try:
        for source, target in moves:
            begun.append((source, target))
            _move(source, target)
    except BaseException:
        _move_back(begun)
        raise


def _move_back(moves: Sequence[tuple[Path, Path]]) -> None:
    """Undo the moves that were done."""
    for source, target in reversed(moves):
        if os.path.lexists(target) and not os.path.lexists(source):
            with suppress(OSError):
                _rescue(target, source)


def _rescue(source: Path, target: Path) -> None:
    """Move a file or folder as far as it can be moved: what cannot be removed stays, beside its copy at `target`."""
    try:
        source.rename(target)
        return
    except OSError:
        pass
    if source.is_dir() and not source.is_symlink():
        target.mkdir()
        for entry in sorted(source.iterdir()):
            _rescue(entry, target / entry.name)
        with suppress(OSError):
            source.rmdir()
    else:
        try:
            shutil.copyfile(source, target, follow_symlinks=False)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        with suppress(OSError):
            source.unlink()


def _move(source: Path, target: Path) -> None:
    """Give a file or folder another name, or copy it where that is not possible. Raises OSError if it is taken."""
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, f"{target.name} came there just now", str(target))
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        if source.is_dir() and not source.is_symlink():
            _move_contents(source, target)
            return
        try:
            shutil.copyfile(source, target, follow_symlinks=False)
            flush(target)
            source.unlink()
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def _move_contents(source: Path, target: Path) -> None:
    moves = [(entry, target / entry.name) for entry in sorted(source.iterdir())]
    target.mkdir()
    try:
        _move_all(moves)
        flush(target)
        # It fails where a file came meanwhile, or where NFS or FUSE keep a removed one that is still open.
        source.rmdir()
    except BaseException:
        _move_back(moves)
        with suppress(OSError):
            target.rmdir()
        raise


def _kept(new: Path, home: Path) -> Path:
    """Move the folder `new` out of its temporary folder and return where it is now."""
    kept = home / f"vglann-kept-{new.parent.name[-8:]}"
    _rescue(new, kept)
    return kept


def content_of(path: str | Path, marker: str | None = None, others: Sequence[str] = ()) -> list[str]:
    """Return the names of what is in the folder `path`, none where there is none, to see if it may be written to.

    Not among them is what the system puts there, and what `atomic_dir` with these `marker` and `others` left there
    when it was killed. Raises `VglannError` when `path` is not a folder or cannot be read.
    """
    with actionable_os_errors(path, Path(os.path.realpath(path))):
        names = [*(_content(Path(os.path.realpath(path))) or {})]
        killed = (
            marker is not None
            and all(name != marker and _matches(name, others) for name in names)
            and any(map(is_stray, os.listdir(path) if names else ()))
        )
    return [] if killed else names


def _content(folder: Path) -> Content | None:
    """Return what is in a folder but strays and the system's files, None where the folder does not exist.

    Raises OSError for what is not a folder.
    """
    try:
        mode = os.stat(folder).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(mode):
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder))
    found = {}
    for entry in os.scandir(folder):
        if not is_stray(entry.name) and not _matches(entry.name, _SYSTEM_FILES):
            with suppress(FileNotFoundError):  # it has gone since
                state = entry.stat(follow_symlinks=False)
                found[entry.name] = (state.st_size, state.st_mtime_ns)
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def remove_dir(path: Path, marker: str) -> None:
    """Remove a folder: a process killed meanwhile leaves a stray, or a folder without its marker."""
    with temporary_folder(path.parent) as temporary:
        try:
            path.rename(temporary / "old")
        except OSError:  # as of a folder in a lower layer of an overlay
            (path / marker).unlink(missing_ok=True)
            shutil.rmtree(path)
