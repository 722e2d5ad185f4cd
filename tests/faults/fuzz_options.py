"""Every option of every command with values by chance, through the command line itself.

A case is drawn from `random.Random(f"{command}-{number}")`. The command is given what it cannot do without, at tiny
size, and then one to three of its options. It may do its work, or refuse in one line; a command that is still at work
after some seconds took the values and is stopped.
"""

import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable
from math import ceil
from pathlib import Path

from faults.case import Case, case, part_of
from faults.forked import Command
from faults.route import SHAPE, TRAIN, Route

from vglann_fast.cli.parser import COMMANDS, command_parser

FULL = 2000
SECONDS = 4  # of work; then the values were taken
MEMORY = 2**31  # bytes of address space beside what the process has

# `fetch` wants a network, and `serve` does not end.
NOT_TRIED = ("clips fetch", "study serve")

SMALL = ("1", "2", "3", "0.5", "true", "false", "1e-3")
NUMBERS = (
    "0", "-1", "1", "2", "3", "7", "1.5", "0.5", "-0.0", "1e-9", "1e3", "1e400", "nan", "inf", "-inf", "0x10", "1_0",
    "١", " 5", "+3", "9223372036854775807", "9223372036854775808", "99999999999999999999999",
)  # fmt: skip
TEXTS = (
    "", " ", "true", "False", "None", "null", "[]", "{}", "[1]", "1,2", ",", "a:1", "l1", "laplacian:1,l2:2",
    "laplacian:nan", "laplacian:-1", "laplacian:1e39", "l1:0", "none", "auto", "cpu", "cuda", "cuda:99", "meta",
    "cpu:1", "triton", "reference,nearest=faiss", "nearest=", "=", "-", "--", "--seed", "imle,gmm", "imle,imle",
    "x" * 5000, "a\nb", "%s{0}", "é", "\udcff", "😀", "~nobody/x", "main", "all",
)  # fmt: skip
# What may stand where a command writes or reads: nothing outside the folder of the case.
PATHS = (
    "",
    ".",
    "new",
    "new/deeper",
    "here",
    "/dev/null",
    "x" * 300,
    "é",
    "\udcff",
    "a\nb",
    "file",
    "file/x",
    " ",
)


def cases(share: float) -> Iterable[Case]:
    """`FULL` values in all, shared by the commands according to the number of their options."""
    with tempfile.TemporaryDirectory() as root:
        route = Route(Path(root))
        arguments = {name: _lines(name, route) for name in COMMANDS if name not in NOT_TRIED}
        weights = {name: len(_options(name)) for name in arguments}
        for name in arguments:
            count = part_of(ceil(FULL * weights[name] / sum(weights.values())), share)
            if weights[name]:
                yield _fuzzed(name, route, arguments[name], count)


def _fuzzed(name: str, route: Route, base: list[str], count: int) -> Case:
    problems, taken = [], 0
    for number in range(count):
        words = [*base, *_drawn(name, random.Random(f"{name}-{number}"))]
        problem, done = _tried(words, route)
        taken += done
        problems.append(problem and f"case {number}, {' '.join(words[len(base) :])!r:.120}: {problem}")
    note = f"{taken} done or at work after {SECONDS} s, the others refused with exit code 2 and one line"
    return case(f"values of options by chance: vglann {name}", problems, note)


def _tried(words: list[str], route: Route) -> tuple[str | None, bool]:
    """Return what went wrong in a command with these words, or None, and whether it did its work."""
    place = route.root / "case"
    shutil.rmtree(place, ignore_errors=True)
    (place / "here").mkdir(parents=True)
    (place / "file").touch()
    shutil.copytree(route.mapped / "run", place / "run")

    def prepare() -> None:
        os.chdir(place)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))

    command = Command(words, route.log, prepare)
    while command.running() and time.monotonic() - command.began < SECONDS:
        time.sleep(0.002)
    stopped = command.end(signal.SIGTERM)
    try:
        ended = command.ended()
    except TimeoutError as error:
        return str(error), False
    if "Traceback" in ended.said:
        return ended.last_line, False
    found_something = words[0] in ("doctor", "verify", "replay") and ended.code == 1
    if ended.code == 0 or found_something or (stopped and ended.code == 143):
        return None, True
    return ended.not_one_line(), False


def _options(name: str) -> list[str]:
    """Return the options of a command that take values by chance, in their long form."""
    return [
        action.option_strings[-1]
        for action in command_parser(name).arguments.values()
        if action.option_strings and action.dest not in ("help", "dry_run")
    ]


def _drawn(name: str, drawn: random.Random) -> list[str]:
    """Return one to three options with values."""
    arguments = [a for a in command_parser(name).arguments.values() if a.option_strings]
    words = []
    for action in drawn.sample(arguments, min(len(arguments), drawn.randint(1, 3))):
        if action.dest in ("out", "resume", "clips", "real"):
            value = drawn.choice(PATHS)
        elif action.choices and drawn.random() < 0.7:
            value = str(drawn.choice(list(action.choices)))
        else:
            value = drawn.choice(drawn.choice((SMALL, SMALL, NUMBERS, TEXTS)))
        flag = action.option_strings[-1]
        words += [f"{flag}={value}"] if flag.startswith("--") else [flag, value]
    return words


def _lines(name: str, route: Route) -> list[str]:
    """Return the words that a command cannot do without, at tiny size; paths are relative to the folder of a case."""
    train = [str(route.clips), "--out", "made", *SHAPE, *TRAIN[:1], "1", "--device", "cpu"]
    if name == "clips pack":
        return [
            "clips",
            "pack",
            str(route.videos()),
            "--out",
            "made",
            "--frames",
            "8",
            "--size",
            "32",
            "--workers",
            "1",
        ]
    needed = {
        "train": ["train", *train],
        "table": ["table", *train, "--features", "none"],
        "clips merge": ["clips", "merge", str(route.clips), "--out", "made"],
        "clips show": ["clips", "show", str(route.clips)],
        "import-glann": ["import-glann", "file", "file", "--out", "made"],
        "map": ["map", "run", "--epochs", "1", "--holdout-fraction", "0"],
        "invert": ["invert", "run", str(route.clips), "--steps", "1", "--starts", "1"],
        "evaluate": ["evaluate", "run", "--features", "none", "--invert", "0"],
        "study make": ["study", "make", "run", "--out", "made"],
        "study report": ["study", "report", "run", "file"],
        "weights import": ["weights", "import", "lite0", str(route.weights())],
        "profile": ["profile", "run", "--steps", "1"],
        "doctor": ["doctor"],
    }
    return needed.get(name, [*name.split(), "run"])
