"""Every command that writes, on every kind of destination that people have, and with any call failing once.

Where a file system or the user's rights allow it the command ends as anywhere else; where they do not it is one line
and exit code 2, before anything is lost. Real mounts need root; elsewhere those lines say so.
"""

import ctypes
import errno
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from failing_calls import ERRORS, fail_once, fail_where, without_renaming_folders
from faults.case import Case, case, not_here, part_of
from faults.forked import Ended, run
from faults.permissions import NOBODY
from faults.route import Route, strays
from faults.writers import Writer, left, writers
from mounts import can_mount, overlay, read_only, tmpfs

MORE_ERRORS = ["EBUSY", "EDQUOT", "ELOOP", "ENAMETOOLONG", "ENOSYS", "ENOTDIR", "EPERM", "EROFS", "ESTALE"]
CALLS = ["mkdir", "open", "rename", "replace", "unlink", "rmdir", "fsync", "flock"]
TURNS = 16


@dataclass(frozen=True)
class Tried:
    """A place made ready, what is done in the process of the command before, and another name for `out`."""

    place: Path
    prepare: Callable[[], None] | None = None
    name: str = "out"


@dataclass(frozen=True)
class Situation:
    """A kind of destination.

    Args:
        name: in the table.
        arrange: route, writer -> `Tried`, as a context.
        refused: the command ends with one line and leaves everything as it was; else it is as undisturbed.
        new_only: only commands whose `out` the user names and that is not there before.
        root: it needs the right to mount, or to give folders to others.
        holds: place -> what is wrong with the folder itself afterwards, if anything.
    """

    name: str
    arrange: Callable[[Route, Writer], "contextmanager[Tried]"]
    refused: bool = False
    new_only: bool = False
    root: bool = False
    holds: Callable[[Path], str | None] = lambda place: None


def cases(share: float) -> Iterable[Case]:
    """Each command in each situation once, then with calls that fail one after the other."""
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        route = Route(Path(root))
        chosen = writers(route)
        chosen = chosen if share >= 0.1 else [one for one in chosen if one.name in ("clips pack", "sample")]
        whole = {writer.name: undisturbed(route, writer) for writer in chosen}
        for situation in SITUATIONS:
            if situation.root and not can_mount():
                yield not_here(situation.name, "it needs the rights of root; run `make faults` as root")
                continue
            tried = [one for one in chosen if one.new or not situation.new_only]
            problems = [in_situation(route, writer, situation, whole[writer.name]) for writer in tried]
            ends = "exit code 2, one line, all as before" if situation.refused else "as undisturbed"
            yield case(
                f"destination: {situation.name}", problems, f"{len(tried)} commands that write; {ends}"
            )
        for writer in chosen:
            yield calls_that_fail(route, writer, whole[writer.name], part_of(TURNS, share))


def undisturbed(route: Route, writer: Writer) -> dict[str, str]:
    """Return what the command leaves, undisturbed."""
    place = writer.place(route.root / "whole")
    ended = run(writer.words(place), route.log)
    if ended.code:
        raise RuntimeError(f"{writer.name}: {ended.said[-500:]}")
    return left(place)


def in_situation(route: Route, writer: Writer, situation: Situation, whole: dict[str, str]) -> str | None:
    """Return what goes wrong in a situation, None if nothing does."""
    with situation.arrange(route, writer) as tried:
        writer.point_to(tried.place, tried.name)
        before = left(tried.place)
        out, renamed = tried.place / "out", tried.place / tried.name
        words = [
            renamed / word.relative_to(out) if isinstance(word, Path) and word.is_relative_to(out) else word
            for word in writer.words(tried.place)
        ]
        ended = run(words, route.log, tried.prepare)
        problem = (
            refused(ended, tried.place, before) if situation.refused else done(ended, tried.place, whole)
        )
        problem = problem or situation.holds(tried.place)
    return problem and f"{writer.name}: {problem}"


def done(ended: Ended, place: Path, whole: dict[str, str]) -> str | None:
    """None if the command ended well and left what it always leaves, and nothing else."""
    if ended.code:
        return f"exit code {ended.code}: {ended.last_line}"
    there = left(place)
    differing = sorted(name for name in there | whole if there.get(name) != whole.get(name))
    if differing:
        return f"{', '.join(differing[:3])} differ"
    return _stray(place)


def refused(ended: Ended, place: Path, before: dict[str, str]) -> str | None:
    """None if the command ended with one line and left everything as it was."""
    return ended.not_one_line() or ("something was changed" if left(place) != before else _stray(place))


def _stray(place: Path) -> str | None:
    found = [*strays(place), *(str(path) for path in place.rglob("vglann-kept-*"))]
    return f"{found[0]} is left" if found else None


# ---- kinds of destinations


@contextmanager
def mount_point(route: Route, writer: Writer) -> Iterator[Tried]:
    """`out` is a disk of its own."""
    place = writer.place(route.root / "place")
    source = writer.before / "out"
    with tmpfs(place / "out") as out:
        if source.is_dir():
            shutil.copytree(source, out, dirs_exist_ok=True)
        yield Tried(place)


@contextmanager
def image(route: Route, writer: Writer) -> Iterator[Tried]:
    """All that is there before lies in a lower layer, as in a container."""
    with overlay(route.root / "image", writer.place(route.root / "place")) as place:
        yield Tried(place)


@contextmanager
def linked(route: Route, writer: Writer, there: bool) -> Iterator[Tried]:
    """`out` is a link to a folder elsewhere."""
    place = writer.place(route.root / "place")
    target = route.root / "elsewhere" / "out"
    shutil.rmtree(target.parent, ignore_errors=True)
    if (place / "out").exists():
        target.parent.mkdir()
        (place / "out").rename(target)
    elif there:
        target.mkdir(parents=True)
    (place / "out").symlink_to(target)
    yield Tried(place)
    shutil.rmtree(target.parent, ignore_errors=True)


def _is_link(place: Path) -> str | None:
    return None if (place / "out").is_symlink() else "the link is gone"


@contextmanager
def own_folder(route: Route, writer: Writer) -> Iterator[Tried]:
    """`out` belongs to the user, the folder it is in does not."""
    place = writer.place(route.root / "place")
    (place / "out").mkdir(exist_ok=True)
    shutil.chown(place, NOBODY)
    yield Tried(place, without_privileges)


def without_privileges() -> None:
    """Give up, for good, what lets root write where it may not."""
    capabilities = struct.pack("Ii", 0x20080522, 0)  # version 3, this process
    if ctypes.CDLL(None).capset(capabilities, bytes(24)):
        raise OSError("cannot give up privileges")


@contextmanager
def shared(route: Route, writer: Writer) -> Iterator[Tried]:
    """A folder that a group shares."""
    place = writer.place(route.root / "place")
    for folder in [place, *(path for path in place.rglob("*") if path.is_dir())]:
        folder.chmod(0o2775)
    yield Tried(place, lambda: os.umask(0o002) and None)


def _is_shared(place: Path) -> str | None:
    lost = [path for path in place.rglob("*") if path.is_dir() and not path.stat().st_mode & stat.S_ISGID]
    return f"{lost[0].relative_to(place)} has lost the setgid bit" if lost else None


@contextmanager
def not_unicode(route: Route, writer: Writer) -> Iterator[Tried]:
    """A name out of an old zip file."""
    yield Tried(writer.place(route.root / os.fsdecode(b"place\xe9")))


@contextmanager
def injected(
    route: Route, writer: Writer, prepare: Callable[[pytest.MonkeyPatch], object]
) -> Iterator[Tried]:
    """A file system that lacks something."""
    yield Tried(writer.place(route.root / "place"), lambda: prepare(pytest.MonkeyPatch()) and None)


def no_flushing(patch: pytest.MonkeyPatch) -> None:
    fail_where(patch, "fsync", errno.EINVAL, lambda _: True)


def no_chmod(patch: pytest.MonkeyPatch) -> None:
    for call in ("chmod", "fchmod"):
        fail_where(patch, call, errno.EPERM, lambda *_: True)


def no_locks(patch: pytest.MonkeyPatch) -> None:
    fail_where(patch, "flock", errno.ENOLCK, lambda *_: True)


def no_renaming(patch: pytest.MonkeyPatch) -> None:
    for call in ("rename", "replace"):
        fail_where(patch, call, errno.ENOSYS, lambda *_: True)


@contextmanager
def unwritable(route: Route, writer: Writer) -> Iterator[Tried]:
    """A disk that is mounted read-only."""
    with read_only(writer.place(route.root / "place")) as place:
        yield Tried(place)


@contextmanager
def in_the_way(route: Route, writer: Writer, make: Callable[[Path], object]) -> Iterator[Tried]:
    """Something that is not a folder has the name."""
    place = writer.place(route.root / "place")
    make(place / "out")
    yield Tried(place)


@contextmanager
def too_long(route: Route, writer: Writer) -> Iterator[Tried]:
    """A name longer than file systems allow."""
    yield Tried(writer.place(route.root / "place"), name="x" * 256)


SITUATIONS = [
    Situation("a mount point", mount_point, root=True),
    Situation("a lower layer of an overlay, as in a container image", image, root=True),
    Situation("a symbolic link to a folder", partial(linked, there=True), holds=_is_link),
    Situation("a symbolic link to where nothing is", partial(linked, there=False), new_only=True, holds=_is_link),
    Situation("the user's own folder in one that is not writable", own_folder, root=True),
    Situation("a folder shared by a group (setgid)", shared, holds=_is_shared),
    Situation("a path that is not UTF-8", not_unicode),
    Situation("a file system that cannot flush (EINVAL)", partial(injected, prepare=no_flushing)),
    Situation("a file system on which chmod is not permitted", partial(injected, prepare=no_chmod)),
    Situation("a file system without locks", partial(injected, prepare=no_locks)),
    Situation("folders that cannot be renamed (EXDEV)", partial(injected, prepare=without_renaming_folders)),
    Situation("nothing can be renamed (ENOSYS)", partial(injected, prepare=no_renaming)),
    Situation("a read-only mount", unwritable, refused=True, root=True),
    Situation("a file has the name", partial(in_the_way, make=Path.touch), refused=True, new_only=True),
    Situation("a link that leads to itself",
              partial(in_the_way, make=lambda out: out.symlink_to("out")), refused=True, new_only=True),
    Situation("a name that is too long", too_long, refused=True, new_only=True),
]  # fmt: skip


# ---- calls that fail


def calls_that_fail(route: Route, writer: Writer, whole: dict[str, str], tries: int) -> Case:
    """One call of the command about a file below its place fails once, with all calls and errors in turn."""
    problems, errors = [], ERRORS + MORE_ERRORS
    for number in range(tries):
        call, name = CALLS[number % len(CALLS)], errors[number * 5 % len(errors)]
        turn = 1 + number // len(CALLS) * 3
        place = writer.place(route.root / "place")
        fails = partial(_arm, call, getattr(errno, name), turn, place)
        ended = run(writer.words(place), route.log, fails)
        if ended.code == 0:
            problem = done(ended, place, whole)
        else:
            problem = ended.not_one_line()
            if problem is None and not _is_kept(ended):
                problem = done(run(writer.continued(place), route.log), place, whole)
        problems.append(problem and f"{name} of {call} {turn}: {problem}")
    note = "exit code 0, or 2 and one line; then the same command again: as undisturbed"
    return case(f"one call fails once under {writer.name}", problems, note)


def _arm(call: str, number: int, turn: int, place: Path) -> None:
    fail_once(pytest.MonkeyPatch(), call, number, turn, place)


def _is_kept(ended: Ended) -> bool:
    """Return True if the output was kept beside the destination, which the user has to look at first."""
    return "is kept as" in ended.said
