"""Folders that may not be written and files that may not be read, by a process that is not root."""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from faults.case import Case, case, not_here
from faults.forked import Ended, run
from faults.route import Route, Verb, left_in, writers

NOBODY = 65534
# verb -> what it reads, in its folder
READ = {
    "map": ["run/options.json", "run/checkpoints/*/state.json", "run/checkpoints/*/latents.safetensors"],
    "sample": ["run/mapping/imle/mapping.json", "run/mapping/imle/mapping.safetensors"],
    "report": ["run/options.json"],
}


def cases(share: float) -> Iterable[Case]:
    """Once each: they do not depend on the moment."""
    if os.geteuid():
        yield not_here(
            "folders of another user", "becoming another user needs root; run `make faults` as root"
        )
        return
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        route = Route(Path(root))
        verbs = [route.verb(name) for name in writers(share)]
        for verb in verbs:
            route.whole(verb)  # loads what the processes that are not root might not be allowed to read
        problems = [read_only(route, verb) for verb in verbs]
        yield case(
            "read-only folder, as an unprivileged user",
            problems,
            "every verb that writes: exit code 2, one line",
        )
        problems = [
            unreadable(route, route.verb(name), file)
            for name in READ
            if name in writers(share)
            for file in READ[name]
        ]
        problems += [unreadable_clips(route, name) for name in ("index.json", "clips-00000.npy")]
        yield case(
            "unreadable file, as an unprivileged user", problems, "exit code 2, one line that names it"
        )


def become_nobody() -> None:
    """Give up root, for good."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def read_only(route: Route, verb: Verb) -> str | None:
    """The verb in a folder of root's: what goes wrong, if anything."""
    folder = verb.place(route.root / "locked")
    folder.chmod(0o755)
    before = left_in(folder)
    problem = run(verb.start(folder), route.log, become_nobody).not_one_line()
    if problem is None and left_in(folder) != before:
        problem = "something was written"
    return problem and f"{verb.name}: {problem}"


def unreadable(route: Route, verb: Verb, pattern: str) -> str | None:
    """The verb in a folder of its own with one file of root's in it."""
    folder = verb.place(route.root / "mixed")
    for path in [folder, *folder.rglob("*")]:
        shutil.chown(path, NOBODY, NOBODY)
    for file in folder.glob(pattern):
        shutil.chown(file, 0, 0)
        file.chmod(0o600)
    return _not_named(run(verb.start(folder), route.log, become_nobody), Path(pattern).name)


def unreadable_clips(route: Route, name: str) -> str | None:
    """A training on clips of which one file is root's."""
    folder = route.root / "theirs"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(route.clips, folder)
    (folder / name).chmod(0o600)
    out = route.root / "out"
    out.mkdir(exist_ok=True)
    shutil.chown(out, NOBODY, NOBODY)
    return _not_named(run(["train", folder, "--out", out / "run"], route.log, become_nobody), name)


def _not_named(ended: Ended, name: str) -> str | None:
    """None if a command ended with one line that names this file, or the folder it is the point of."""
    known = name if name.endswith(".npy") else Path(name).stem
    return ended.not_one_line() or (
        None if known in ended.errors[0] else f"{name} unnamed: {ended.errors[0]}"
    )
