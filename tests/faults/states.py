"""Damaged checkpoints, several commands on one run, and clocks that jump."""

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from faults.case import Case, case, part_of
from faults.forked import Command, run
from faults.route import Route

from vglann_fast.run.folder import RunDir

EPOCHS = 4  # of the route's training, with a checkpoint after each; two are kept


def cases(share: float) -> Iterable[Case]:
    """Every way to damage every file of a checkpoint; the rest drawn from a seed."""
    with tempfile.TemporaryDirectory() as root:
        route = Route(Path(root))
        yield torn(route, share)
        yield retained(route)
        yield locked(route)
        yield at_once(route, part_of(10, share))
        yield clock_jumps(route, part_of(5, share))


# ---- checkpoints


def _flip(file: Path, drawn: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    file.write_bytes(content)


def _cut(file: Path, drawn: random.Random) -> None:
    os.truncate(file, drawn.randrange(file.stat().st_size))


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "cut off": _cut,
    "a bit flipped": _flip,
    "emptied": lambda file, drawn: os.truncate(file, 0),
    "removed": lambda file, drawn: file.unlink(),
    "zeros, as after a crash": lambda file, drawn: file.write_bytes(bytes(file.stat().st_size)),
}


def torn(route: Route, share: float) -> Case:
    """Each file of the newest checkpoint, each damage: --resume says so and ends like the undisturbed training."""
    verb, drawn = route.verb("train"), random.Random(0)
    route.whole(verb)
    names = ["state.json", "generator.safetensors", "latents.safetensors", "optimizer.safetensors"]
    tries = [(name, kind) for name in names for kind in DAMAGE]
    problems: list[str | None] = []
    for name, kind in drawn.sample(tries, part_of(len(tries), share)):
        folder = route.root / "torn"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(route.trained, folder)
        checkpoint = sorted((folder / "run" / "checkpoints").iterdir())[-1]
        before = (checkpoint / name).read_bytes()
        DAMAGE[kind](checkpoint / name, drawn)
        harmless = name == "state.json" and kind == "a bit flipped" and _still_says(checkpoint / name, before)
        ended = run(verb.again(folder), route.log)
        said = f"{checkpoint.name} is damaged" in ended.said
        problem = None if said or harmless else f"nothing said of {name} {kind}: {ended.last_line}"
        problems.append(problem or route.mends(verb, folder, newest=True))
    return case(
        "torn newest checkpoint",
        problems,
        "falls back to the one before, names the damaged one, then as undisturbed",
    )


def _still_says(file: Path, before: bytes) -> bool:
    """Return True if a flipped bit did not harm state.json: in white space, or in what nothing depends on."""
    try:
        return json.loads(file.read_bytes()).keys() == json.loads(before).keys()
    except ValueError:
        return False


def retained(route: Route) -> Case:
    """--keep-checkpoints 1 to 4 in a training that is stopped and resumed."""
    problems: list[str | None] = []
    for keep in range(1, EPOCHS + 1):
        folder = route.verb("train").place(route.root / "kept")
        words = [*route.verb("train").start(folder), "--keep-checkpoints", str(keep)]
        run(words, route.log)
        kept = sorted(int(path.name[5:]) for path in (folder / "run" / "checkpoints").iterdir())
        steps = [2 * epoch for epoch in range(1, EPOCHS + 1)][-keep:]
        problems.append(None if kept == steps else f"of {EPOCHS} checkpoints, keeping {keep}: {kept}")
    return case(
        "retention of checkpoints", problems, "--keep-checkpoints 1 to 4 of 4: exactly the newest stay"
    )


# ---- several commands on one run


def locked(route: Route) -> Case:
    """The verbs that take the lock, while another process holds it."""
    problems: list[str | None] = []
    for name in ("train", "map", "evaluate"):
        verb = route.verb(name)
        folder = (
            verb.place(route.root / "held") if name != "train" else _copy(route.trained, route.root / "held")
        )
        with RunDir.open(folder / "run").locked():
            ended = run(verb.again(folder), route.log)
        named = f"is being written by process {os.getpid()} on " in ended.said
        problems.append(ended.not_one_line() or (None if named else ended.last_line))
        problems.append(route.mends(verb, folder))
    return case(
        "a second command on a run that is being written",
        problems,
        "exit code 2, one line that names the process; afterwards as undisturbed",
    )


def at_once(route: Route, times: int) -> Case:
    """Two trainings into one folder and a kill of one of them."""
    problems, drawn, verb = [], random.Random(0), route.verb("train")
    for _ in range(times):
        folder = verb.place(route.root / "both")
        logs = [route.root / f"said-{n}.txt" for n in range(2)]
        both = [Command(verb.start(folder), log) for log in logs]
        time.sleep(drawn.uniform(0, 0.5))
        both[0].end(signal.SIGKILL)
        second = [command.ended() for command in both][1]
        fine = second.code == 0 or second.not_one_line() is None
        problems.append(route.mends(verb, folder) if fine else f"the other: {second.last_line}")
    return case(
        "two trainings started at once in one folder, one killed",
        problems,
        "the other trains or says in one line why not; then as undisturbed",
    )


def _copy(source: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(source, folder))


# ---- clocks


def clock_jumps(route: Route, times: int) -> Case:
    """time.time and the times of files jump by up to ten years, back and forth."""
    problems: list[str | None] = []
    for number in range(times):
        for name in ("clips pack", "train", "map", "evaluate"):
            verb, drawn = route.verb(name), random.Random(number)
            route.whole(verb)
            folder = verb.place(route.root / "clocks") if name != "train" else _half_trained(route)
            for file in folder.rglob("*"):
                os.utime(file, (drawn.uniform(0, 3e9),) * 2)
            ended = run(verb.again(folder), route.log, lambda drawn=drawn: _jumping(drawn))
            problems.append(route.came_through(ended, verb, folder))
    return case(
        "clock jumps",
        problems,
        "pack, train, map, evaluate with time.time and the times of files anywhere in 1970 to 2065: as undisturbed",
    )


def _half_trained(route: Route) -> Path:
    """A training that was stopped when half of it was done."""
    folder = _copy(route.trained, route.root / "clocks")
    for checkpoint in sorted((folder / "run" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    return folder


def _jumping(drawn: random.Random) -> None:
    time.time = lambda: drawn.uniform(0, 3e9)
