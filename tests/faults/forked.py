"""A command of `vglann` in a process of its own that may be killed at any moment.

It is forked, so it starts at once and all of its time is the command's own: importing torch would take most of the
time of a tiny command, and a kill then would break nothing. On a CPU alone, since CUDA does not survive a fork.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch

from vglann_fast.cli.main import main

PATIENCE = 300.0  # seconds; a command that takes longer hangs

Prepare = Callable[[], None]

os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.set_num_threads(1)


@dataclass(frozen=True)
class Ended:
    """The end of a command: its exit code (-n after signal n), what it said, and the seconds it took."""

    code: int
    said: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines that say what was wrong."""
        return [line for line in self.said.splitlines() if line.startswith("vglann: error: ")]

    def not_one_line(self) -> str | None:
        """None if this is how a mistake of the user's ends: exit code 2 and one line; else what it was."""
        if self.code == 2 and len(self.errors) == 1 and "Traceback" not in self.said:
            return None
        return f"exit code {self.code}: {self.last_line}"

    @property
    def last_line(self) -> str:
        """The last thing it said."""
        return (self.said.strip().splitlines() or ["nothing"])[-1]


class Command:
    """`vglann ARGUMENTS`, running.

    Args:
        log: a file for what it says.
        prepare: called in the new process before the command.
    """

    def __init__(self, arguments: Sequence[str | Path], log: Path, prepare: Prepare | None = None) -> None:
        self._log, self._code = log, None
        sys.stdout.flush()
        sys.stderr.flush()
        with log.open("w+b") as file:
            self.began = time.monotonic()
            self.pid = os.fork()
            if self.pid == 0:
                _become([str(word) for word in arguments], file.fileno(), prepare)

    def end(self, number: int) -> bool:
        """Send a signal; False if the command had ended already."""
        self._poll()
        if self._code is None:
            os.kill(self.pid, number)
        return self._code is None

    def running(self) -> bool:
        """Return True until the command has ended."""
        return self._poll() is None

    def ended(self) -> Ended:
        """Wait for the end. Raises TimeoutError if it does not come."""
        while self._poll() is None:
            if time.monotonic() - self.began > PATIENCE:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"a command hangs, saying {self._log.read_text()[-500:]!r}")
            time.sleep(0.002)
        return Ended(self._code, self._log.read_text(errors="replace"), time.monotonic() - self.began)

    def _poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code


def _become(arguments: list[str], output: int, prepare: Prepare | None) -> None:
    """In the new process: run the command and end."""
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        if prepare is not None:
            prepare()
        code = main(arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(AttributeError, OSError, ValueError):  # streams may be what `prepare` made of them
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run_here(arguments: Sequence[str | Path]) -> None:
    """Run a command in this process, which then has loaded all the command needs. Raises RuntimeError if it fails."""
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = main([str(word) for word in arguments])
    if code:
        raise RuntimeError(f"{arguments}: {said.getvalue()}")


def run(arguments: Sequence[str | Path], log: Path, prepare: Prepare | None = None) -> Ended:
    """Run a command to its end."""
    return Command(arguments, log, prepare).ended()
