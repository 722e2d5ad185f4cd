"""A disk that is full: each verb writes to a small tmpfs that has room for a share of what it writes.

Then there is room again, and the same command (for train: --resume) has to end as if nothing had been.
Mounting needs root; elsewhere this part says so and does nothing.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from faults.case import Case, case, not_here, part_of
from faults.forked import run
from faults.route import Route, Verb, strays, writers
from mounts import can_mount, mount, tmpfs

PAGE = 4096
ROOMY = 256 * 2**20


def cases(share: float) -> Iterable[Case]:
    """10 sizes of the disk for each verb."""
    if not can_mount():
        yield not_here("full disk", "mounting a tmpfs needs root; run `make faults` as root")
        return
    with tempfile.TemporaryDirectory() as root:
        route = Route(Path(root))
        for name in writers(share):
            yield full_disks(route, route.verb(name), part_of(10, share))


def full_disks(route: Route, verb: Verb, sizes: int) -> Case:
    """The command with no room, then with ever more, but never with enough."""
    route.whole(verb)
    whole = verb.place(route.root / "measured")
    before = used_bytes(whole)
    run(verb.start(whole), route.log)
    grows = used_bytes(whole) - before
    problems = []
    with tmpfs(route.root / "disk", f"size={ROOMY}") as disk:
        for number in range(sizes):
            folder = verb.place(disk / "work")
            resize(disk, used_bytes(disk) + int(grows * number / sizes) // PAGE * PAGE)
            ended = run(verb.start(folder), route.log)
            problem = ended.not_one_line() or half_left(folder)
            resize(disk, ROOMY)
            problems.append(problem or route.mends(verb, folder))
    room = f"room for 0 to {100 * (sizes - 1) // sizes} % of {grows / 1e6:.2f} MB"
    note = f"{room}; exit code 2, one line, no temporary file; then, with room, as undisturbed"
    return case(f"full disk under {verb.name}", problems, note)


def half_left(folder: Path) -> str | None:
    """Return what is wrong with the folder of a command that failed, None if nothing is."""
    left = strays(folder)
    return f"{left[0]} is left" if left else None


def used_bytes(folder: Path) -> int:
    """Return the bytes that the files under `folder` take on a tmpfs, by whole pages; folders take none."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return sum(-(-file.stat().st_size // PAGE) * PAGE for file in files)


def resize(disk: Path, size: int) -> None:
    """From now on the disk holds so many bytes, at least a page: a tmpfs takes 0 for no limit."""
    mount("mount", "-o", f"remount,size={max(size, PAGE)}", disk)
