"""One of two processes of a training is killed: the other ends, says why, and both can resume.

The processes are set up as by torchrun (gloo, on this machine), once under torchrun itself.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from faults.case import Case, case, part_of
from faults.forked import PATIENCE, Command, Ended
from faults.route import Route, left_in

SIZE = 2
SOON = 60.0  # seconds in which the other has to end; the timeout for one that hangs is ten minutes
FEW = ["--width", "2", "--latent-dim", "4", "--levels", "1", "--batch-size", "2", "--epochs", "40"]
OPTIONS = [*FEW, "--checkpoint-every", "5", "--log-every", "1", "--device", "cpu"]


def cases(share: float) -> Iterable[Case]:
    """10 moments, of which process 0 is killed at every other, and one under torchrun."""
    with tempfile.TemporaryDirectory() as root:
        route = Route(Path(root))
        whole = route.root / "whole-ranks"
        for ended in finish(together(route, whole)):
            if ended.code:
                raise RuntimeError(ended.said)
        problems = [one_killed(route, whole, number) for number in range(part_of(10, share))]
        note = f"the other ends in {SOON:.0f} s with exit code 2 and names the cause; then --resume: as undisturbed"
        yield case("one of two processes killed", problems, note)
        note = "torchrun ends within a minute, not with 0; what was saved is whole"
        yield case("one of two processes killed, under torchrun", [under_torchrun(route)], note)


def together(route: Route, run: Path) -> list[Command]:
    """Start both processes: of a new run or, if it has begun, to resume it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    begun = (run / "options.json").exists()
    words = ["--resume", run, *OPTIONS[len(FEW) :]] if begun else [route.clips, "--out", run, *OPTIONS]

    def rank(number: int) -> None:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(SIZE)}
        os.environ.update(place, RANK=str(number), LOCAL_RANK=str(number))

    logs = [route.root / f"said-{number}.txt" for number in range(SIZE)]
    return [Command(["train", *words], log, lambda n=n: rank(n)) for n, log in enumerate(logs)]


def finish(commands: list[Command]) -> list[Ended]:
    """Wait for all."""
    return [command.ended() for command in commands]


def one_killed(route: Route, whole: Path, number: int) -> str | None:
    """Kill a process at a moment drawn from `number`, then resume; return what went wrong, if anything."""
    run, drawn = route.root / f"run-{number}", random.Random(number)
    commands = together(route, run)
    until(lambda: _lines(run) > drawn.randrange(1, 15), commands)
    victim = number % SIZE
    commands[victim].end(signal.SIGKILL)
    before = time.monotonic()
    left = commands[1 - victim].ended()
    if commands[victim].ended().code != -signal.SIGKILL:
        return "it was over before it was killed"
    if left.code != 2 or "another process of this job has ended" not in left.said:
        return f"the other: exit code {left.code}: {left.last_line}"
    if time.monotonic() - before > SOON:
        return f"the other ended after {time.monotonic() - before:.0f} s"
    for ended in finish(together(route, run)):
        if ended.code:
            return f"--resume: exit code {ended.code}: {ended.last_line}"
    return None if left_in(run) == left_in(whole) else "the files differ from the undisturbed run's"


def under_torchrun(route: Route) -> str | None:
    """Kill a worker of torchrun."""
    run = route.root / "torchrun"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(SIZE)]
    words += ["-m", "vglann_fast", "train", route.clips, "--out", run, *OPTIONS, "--epochs", "100000"]
    with (route.root / "torchrun.txt").open("w") as said:
        launcher = subprocess.Popen([str(word) for word in words], stdout=said, stderr=said)
        try:
            until(lambda: _lines(run) > 5 or launcher.poll() is not None, [])
            workers = _children(launcher.pid)
            if not workers:
                return "it ended before it was killed"
            os.kill(workers[-1], signal.SIGKILL)
            code = launcher.wait(SOON)
        finally:
            launcher.kill()
            launcher.wait()
    if code == 0 or any(Path(f"/proc/{worker}/exe").exists() for worker in workers):
        return f"exit code {code}, or a process is left"
    return None


def until(true: Callable[[], bool], commands: list[Command]) -> None:
    """Wait until `true()`. Raises TimeoutError."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > PATIENCE:
            for command in commands:
                command.end(signal.SIGKILL)
            raise TimeoutError("nothing was logged")
        time.sleep(0.01)


def _lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"\nPPid:\t{pid}\n" in status.read_text():
                found.append(int(status.parent.name))
        except OSError:
            pass  # it has ended
    return sorted(found)
