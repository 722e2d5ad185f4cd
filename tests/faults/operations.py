"""SIGKILL right before a verb opens for writing, renames, makes or removes a file for the k-th time, for every k.

Then follows a resume, or the same command again.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from faults.case import Case, case, part_of
from faults.forked import run
from faults.route import Route, Verb, writers

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.chmod"}


def cases(share: float) -> Iterable[Case]:
    """All operations of every verb that writes; with a share of 1/n, every n-th."""
    with tempfile.TemporaryDirectory() as root:
        route = Route(Path(root))
        for name in writers(share):
            yield killed_at_operations(route, route.verb(name), every=part_of(1, 1 / share))


def killed_at_operations(route: Route, verb: Verb, every: int) -> Case:
    """SIGKILL right before each of the command's operations on files."""
    route.whole(verb)
    problems: list[str | None] = []
    number = 1
    while True:
        folder = verb.place(route.root / "killed")
        fatal = Fatal(folder, number)
        ended = run(verb.start(folder), route.log, fatal.arm)
        if ended.code == 0:
            break
        problem = route.mends(verb, folder) if ended.code == -signal.SIGKILL else f"exit code {ended.code}"
        problems.append(problem and f"operation {number}: {problem}")
        number += every
    note = f"each file opened for writing, renamed, made or removed; then {verb.then}: as undisturbed"
    return case(
        f"SIGKILL of {verb.name} before {'each' if every == 1 else 'some'} of its file operations",
        problems,
        note,
    )


class Fatal:
    """An audit hook: the `number`-th operation that changes files under `folder` kills the process before it."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.left = str(folder), number

    def arm(self) -> None:
        """From now on, in this process, for good."""
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = bool(flags & (os.O_WRONLY | os.O_RDWR)) and self._ours(path)
        else:
            changes = event in CHANGES and self._ours(arguments[0])
        if changes:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def _ours(self, path: Any) -> bool:
        # Names without a folder come from shutil.rmtree, which goes by descriptors.
        return isinstance(path, str | os.PathLike) and (
            str(path).startswith(self.folder) or os.sep not in str(path)
        )
