"""SIGKILL and SIGTERM in the middle of the verbs that write, each followed by a resume or the same command again.

A kill comes at a moment drawn uniformly from the time the undisturbed command takes; one that comes too late, after
the command's end, is drawn again. Such moments rarely hit the few milliseconds that matter most: those are in
operations.py.
"""

import random
import signal
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from faults.case import Case, case, part_of
from faults.forked import Command, run
from faults.route import Route, Verb, writers

MOMENTS = ("clips pack", "train", "map", "evaluate")


def cases(share: float) -> Iterable[Case]:
    """50 moments of each verb."""
    with tempfile.TemporaryDirectory() as root:
        route, moments = Route(Path(root)), part_of(50, share)
        for name in filter(MOMENTS.__contains__, writers(share)):
            yield killed_at_moments(route, route.verb(name), moments)
        yield terminated(route, moments)


def killed_at_moments(route: Route, verb: Verb, moments: int, seed: int = 0) -> Case:
    """SIGKILL at so many moments of the command."""
    duration, problems = usual_seconds(route, verb), []
    drawn = random.Random(f"{seed} {verb.name}")
    late = 0
    while len(problems) < moments and late < 10 * moments:
        folder = verb.place(route.root / "killed")
        if not ended_at(route, verb, folder, drawn.uniform(0, duration), signal.SIGKILL):
            late += 1
            continue
        problems.append(route.mends(verb, folder))
    note = f"moments drawn over {duration:.2f} s; then {verb.then}: all files as undisturbed, bit for bit"
    return case(f"SIGKILL of {verb.name} at random moments", problems, note)


def terminated(route: Route, moments: int, seed: int = 1) -> Case:
    """SIGTERM at so many moments of a training."""
    verb, problems, late = route.verb("train"), [], 0
    duration, drawn = usual_seconds(route, verb), random.Random(seed)
    while len(problems) < moments and late < 10 * moments:
        folder = verb.place(route.root / "killed")
        command = Command(verb.start(folder), route.log)
        time.sleep(drawn.uniform(0, duration))
        hit = command.end(signal.SIGTERM)
        ended = command.ended()
        if not hit or ended.code == 0:
            late += 1
            continue
        saved = "stopped by SIGTERM and saved" in ended.said
        # Before the first step there is nothing to save. What has made no folder yet has not read its arguments.
        in_order = ended.code == 143 or (ended.code == -signal.SIGTERM and not (folder / "run").exists())
        wrong = not in_order or (not saved and (folder / "run" / "metrics.jsonl").exists())
        problems.append(
            f"exit code {ended.code}: {ended.last_line}" if wrong else route.mends(verb, folder, newest=True)
        )
    note = "exit code 143, saved once there was a step; then --resume: the last checkpoint as undisturbed"
    return case("SIGTERM of train at random moments", problems, note)


def usual_seconds(route: Route, verb: Verb) -> float:
    """Return the seconds the command takes undisturbed, once all that it needs has been loaded."""
    route.whole(verb)
    return run(verb.start(verb.place(route.root / "timed")), route.log).seconds


def ended_at(route: Route, verb: Verb, folder: Path, moment: float, number: int) -> bool:
    """Start the command and send it a signal; False if it was over by then."""
    command = Command(verb.start(folder), route.log)
    time.sleep(max(0.0, moment - (time.monotonic() - command.began)))
    hit = command.end(number)
    command.ended()
    return hit
