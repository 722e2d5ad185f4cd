"""Commands in whatever host they find: its streams, signals, threads, variables, locale, names and PyTorch.

Two ways to run a command: as a guest, `main()` called by a program with a state of its own, which must come back; and
as a program, in a process with another environment. Either way the artifacts equal an undisturbed run's.
"""

import io
import logging
import os
import pwd
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults.case import Case, case, not_here, part_of
from faults.forked import PATIENCE, Command, Ended, Prepare, run
from faults.route import Route, Verb, strays, writers

from vglann_fast.cli.main import main
from vglann_fast.runtime import memory

CHANGED = 99  # exit code of a guest that left something behind
CLONE_NEWNS = 0x00020000


def cases(share: float) -> Iterable[Case]:
    """Every command as a guest of each host, as a program in each environment, and under each name."""
    with tempfile.TemporaryDirectory() as root:
        route = Route(Path(root))
        verbs = [route.verb(name) for name in writers(share)]
        yield from guests(route, verbs)
        yield from programs(route, verbs, share)
        yield from names(route, verbs)
        yield outputs(route)
        yield hung_up(route, part_of(20, share))
        yield gone_folder(route, verbs)


# ---- guests: main() in a host program


class Bare:
    """A stream that only writes."""

    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass


def _ascii() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")


def _streams(make: Callable[[], Any]) -> None:
    sys.stdout, sys.stderr = make(), make()


def _closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def _handlers(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, handler)


def _no_home() -> None:
    def no_entry(uid: int) -> None:
        raise KeyError(uid)

    pwd.getpwuid = no_entry  # type: ignore[assignment]
    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"):
        os.environ.pop(name, None)


def _arithmetic(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)


HOSTS: dict[str, Callable[[], None]] = {
    "default dtype float64": partial(_arithmetic, torch.float64),
    "default dtype bfloat16": partial(_arithmetic, torch.bfloat16),
    "streams None, as under pythonw": partial(_streams, lambda: None),
    "streams without isatty, fileno and encoding": partial(_streams, Bare),
    "streams that are closed": partial(_streams, _closed),
    "streams of ASCII, strict": partial(_streams, _ascii),
    "signals ignored, as under nohup and &": partial(_handlers, signal.SIG_IGN),
    "signals handled by the host": partial(_handlers, lambda number, frame: None),
    "logging configured by the host": partial(logging.basicConfig, level=logging.ERROR),
    "warnings as errors": partial(warnings.simplefilter, "error"),
    "no home and no entry in passwd": _no_home,
    "a home that is not there": partial(os.environ.update, HOME="/nonexistent", XDG_CACHE_HOME=""),
    "a relative XDG_CACHE_HOME": partial(os.environ.update, XDG_CACHE_HOME="cache/of/mine"),
    "WORLD_SIZE empty, RANK and LOCAL_RANK left behind": partial(
        os.environ.update, WORLD_SIZE="", RANK="3", LOCAL_RANK="2"
    ),
    "no arguments in sys": lambda: delattr(sys, "argv"),
    "umask 077": lambda: os.umask(0o077),
    "files of /proc missing": lambda: setattr(memory, "PROC", Path("/nonexistent")),
}


def guests(route: Route, verbs: list[Verb]) -> Iterable[Case]:
    """The commands in each host, in its main thread, in another one, and twice in a row."""
    note = "exit code 0, artifacts as undisturbed, the host's state as it was"
    for name, set_up in HOSTS.items():
        yield case(f"guest of a host with {name}", [guest(route, verb, set_up) for verb in verbs], note)
    problems = [guest(route, verb, lambda: None, _in_a_thread) for verb in verbs]
    yield case("guest in another thread than the main one", problems, note)
    if not _without_proc_works():
        yield not_here("guest without a /proc", "hiding /proc needs root; run `make faults` as root")
        return
    problems = [guest(route, verb, _hide_proc) for verb in verbs]
    yield case("guest without a /proc", problems, note)


def guest(
    route: Route, verb: Verb, set_up: Callable[[], None], call: Callable[[list[str]], int] = main
) -> str | None:
    """Run a command in a forked host; what went wrong, if anything."""
    route.whole(verb)
    folder = verb.place(route.root / "guest")
    words = [str(word) for word in verb.start(folder)]
    ended = run([], route.log, partial(_host, words, set_up, call))
    return _judged(route, verb, folder, ended)


def _host(words: list[str], set_up: Callable[[], None], call: Callable[[list[str]], int]) -> None:
    """In the new process: be a host that runs a command, and end with what came of it."""
    set_up()
    before = _state()
    code = call(words)
    left = [name for name, value in _state().items() if value != before[name]]
    if code == 0 and left:
        os.write(2, f"changed: {', '.join(left)}\n".encode())
        code = CHANGED
    os._exit(code)


def _in_a_thread(words: list[str]) -> int:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(words)))
    thread.start()
    thread.join()
    return codes[0] if codes else 1


def _state() -> dict[str, Any]:
    """Return the state of the process that a host program may care for."""
    root, ours = logging.getLogger(), logging.getLogger("vglann_fast")
    mask = os.umask(0)
    os.umask(mask)
    return {
        "streams": (
            sys.stdout,
            sys.stderr,
            getattr(sys.stdout, "errors", None),
            getattr(sys.stderr, "errors", None),
        ),
        "signals": [
            signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)
        ],
        "logging": (root.level, list(root.handlers), ours.level, list(ours.handlers)),
        "warnings": list(warnings.filters),
        "folder": os.getcwd(),
        "umask": mask,
        "variables": {
            k: v for k, v in os.environ.items() if k.startswith(("VGLANN", "CUBLAS", "OMP", "HOME"))
        },
        "sys.path": list(sys.path),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "random numbers": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
        "processes": _children(),
    }


def _children() -> list[str]:
    file = Path(f"/proc/self/task/{os.getpid()}/children")
    return file.read_text().split() if file.exists() else []


def _hide_proc() -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    private = 0x4000 | 0x40000  # MS_REC | MS_PRIVATE
    failed = libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, private, None)
    if failed or libc.mount(b"none", b"/proc", b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), "/proc cannot be hidden")


def _without_proc_works() -> bool:
    child = os.fork()
    if child == 0:
        try:
            _hide_proc()
            os._exit(int(os.path.exists("/proc/self/status")))
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- programs: `python -m vglann_fast` in an environment

PLAIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "LC_ALL=POSIX without UTF-8 mode": {**PLAIN, "LC_ALL": "POSIX"},
    "a locale that is not installed": {"LC_ALL": "xx_XX.bogus", "LANG": "xx_XX.bogus"},
    "PYTHONIOENCODING=ascii": {"PYTHONIOENCODING": "ascii"},
    "a broken TZ, no TERM, COLUMNS=0": {"TZ": "No/Where", "TERM": "", "COLUMNS": "0"},
    "OMP_NUM_THREADS=0": {"OMP_NUM_THREADS": "0"},
    "OMP_NUM_THREADS=abc": {"OMP_NUM_THREADS": "abc"},
    "a TMPDIR that is not there": {"TMPDIR": "/nonexistent"},
    "PYTHONOPTIMIZE=2": {"PYTHONOPTIMIZE": "2"},
    "PYTHONUNBUFFERED and PYTHONDEVMODE": {"PYTHONUNBUFFERED": "1", "PYTHONDEVMODE": "1"},
}


def programs(route: Route, verbs: list[Verb], share: float) -> Iterable[Case]:
    """The commands in each environment, in a folder whose name is neither ASCII nor UTF-8."""
    note = "a folder whose name is Latin-1; exit code 0, artifacts as undisturbed where threads are as many"
    chosen = verbs if share == 1 else verbs[:1]
    for name, variables in ENVIRONMENTS.items():
        problems = [program(route, verb, variables) for verb in chosen]
        yield case(f"program under {name}", problems, note)


def program(route: Route, verb: Verb, variables: dict[str, str]) -> str | None:
    """Run a command in a process of its own; what went wrong, if anything."""
    route.whole(verb)
    folder = verb.place(route.root / os.fsdecode(b"caf\xe9"))
    ended = _program(route, verb.start(folder), variables)
    if "OMP_NUM_THREADS" not in variables:
        return _judged(route, verb, folder, ended)
    # Another number of threads sums in another order.
    return None if ended.code == 0 else f"{verb.name}: exit code {ended.code}: {ended.last_line}"


def _program(
    route: Route, words: Iterable[str | Path], variables: dict[str, str], redirection: str = ""
) -> Ended:
    command = shlex.join([sys.executable, "-m", "vglann_fast", *map(str, words)])
    with route.log.open("wb") as log:
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", f"{command} {redirection}"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), "kernels"]), **variables},
            stdout=log,
            stderr=log,
            timeout=PATIENCE,
            check=False,
        )
    return Ended(done.returncode, route.log.read_text(errors="replace"), time.monotonic() - began)


def _judged(route: Route, verb: Verb, folder: Path, ended: Ended) -> str | None:
    """Return what is wrong with a command that should have ended well, None if nothing is."""
    if "Traceback" in ended.said:
        return f"{verb.name}: {ended.last_line}"
    if strays(folder):
        return f"{verb.name}: {strays(folder)[0]} is left"
    problem = route.differs(ended, verb, folder)
    return problem and f"{verb.name}: {problem}"


# ---- names of folders

NAMES = {
    "not UTF-8": os.fsdecode(b"caf\xe9 \xff"),
    "255 bytes": "é" * 127 + "x",
    "spaces, quotes, glob and format characters": " a'b\"c *?[d] %s %04d {} $HOME #",
    "a line break and a tab": "a\nb\tc",
    "a leading dash": "-x",
    "a tilde": "~",
}


def names(route: Route, verbs: list[Verb]) -> Iterable[Case]:
    """The commands in folders of any name."""
    for name, folder_name in NAMES.items():
        problems = []
        for verb in verbs:
            route.whole(verb)
            folder = verb.place(route.root / folder_name)
            problems.append(_judged(route, verb, folder, run(verb.start(folder), route.log)))
        yield case(f"a folder with {name} in its name", problems, "exit code 0, artifacts as undisturbed")


# ---- standard output and error that take nothing


def outputs(route: Route) -> Case:
    """A training whose streams are closed, full, or a pipe that nobody reads."""
    verb = route.verb("train")
    route.whole(verb)
    problems = []
    for redirection, codes in {
        ">&-": {0},
        "2>&-": {0},
        "<&- >&- 2>&-": {0},
        "2>/dev/full": {0},
        ">/dev/full": {2},
        "> >(exec true)": {0, 141},
        "2> >(exec true)": {0},
    }.items():
        folder = verb.place(route.root / "outputs")
        ended = _program(route, verb.start(folder), {}, redirection)
        if ended.code not in codes or len(ended.errors) > 1 or "Traceback" in ended.said:
            problems.append(f"{redirection}: exit code {ended.code}: {ended.last_line}")
        else:
            problems.append(route.differs(Ended(0, "", 0), verb, folder))
    note = "closed, /dev/full and pipes without a reader: trained as undisturbed, no traceback"
    return case("streams of train that take nothing", problems, note)


# ---- hanging up


def hung_up(route: Route, moments: int) -> Case:
    """SIGHUP and SIGTERM together, as the end of a session sends them, at moments of pack and train."""
    problems: list[str | None] = []
    drawn, late = random.Random(3), 0
    for name in ("clips pack", "train"):
        verb = route.verb(name)
        route.whole(verb)
        usual = run(verb.start(verb.place(route.root / "timed")), route.log).seconds
        hits = 0
        while hits < max(1, moments // 2) and late < 10 * moments:
            folder = verb.place(route.root / "hung")
            command = Command(verb.start(folder), route.log)
            # What has just begun has no handlers yet, and leaves nothing behind either.
            time.sleep(drawn.uniform(usual / 10, usual))
            hit = command.end(signal.SIGHUP) and command.end(signal.SIGTERM)
            ended = command.ended()
            if not hit or ended.code == 0:
                late += 1
                continue
            hits += 1
            problems.append(_after_hanging_up(route, verb, folder, ended))
    note = "both at once: exit code 129 or 143, no stray, then again or --resume: as undisturbed"
    return case("SIGHUP and SIGTERM of clips pack and train", problems, note)


def _after_hanging_up(route: Route, verb: Verb, folder: Path, ended: Ended) -> str | None:
    if ended.code not in (129, 143, -signal.SIGHUP, -signal.SIGTERM):
        return f"{verb.name}: exit code {ended.code}: {ended.last_line}"
    if ended.code > 0 and strays(folder):
        return f"{verb.name}: {strays(folder)[0]} is left"
    return route.mends(verb, folder, newest=verb.name == "train")


def gone_folder(route: Route, verbs: list[Verb]) -> Case:
    """The commands in a current folder that was removed."""

    def leave() -> None:
        gone = tempfile.mkdtemp()
        os.chdir(gone)
        os.rmdir(gone)

    problems = []
    for verb in verbs:
        route.whole(verb)
        folder = verb.place(route.root / "gone")
        prepare: Prepare = leave
        problems.append(run(verb.start(folder), route.log, prepare).not_one_line())
    return case("a current folder that was removed", problems, "exit code 2, one line")
