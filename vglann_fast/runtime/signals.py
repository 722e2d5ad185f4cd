"""Signals that end a program: a training stops after the step in progress, and other commands in order.

SIGTERM, SIGINT and SIGHUP (a terminal that closed) are treated alike. A signal belongs to the host program where that
ignores it (`nohup`, a command started with `&` in a script) or has a handler of its own, in Python or in C. Such a
signal stays as it is.
"""

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal arrived; the training was saved after the step in progress."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} and saved")
        self.exit_code = 128 + signal_number


class _Handler:
    """A handler of this module, so that a nested block knows it from a handler of the host program."""

    def __init__(self, act: Callable[[int], None]) -> None:
        self._act = act

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._act(number)


@contextmanager
def signals_collected(alone: bool) -> Iterator[list[int]]:
    """Collect the signals instead of dying of them; a second one of a kind kills as usual.

    Not so in one process of several (`alone` false), where the launcher and the scheduler may each send one.
    Outside the main thread, which alone may have handlers, nothing is collected.
    """
    received: list[int] = []

    def remember(number: int) -> None:
        received.append(number)
        if alone:
            signal.signal(number, before[number])

    with _handling((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), remember) as before:
        yield received


@contextmanager
def terminated_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program as Ctrl-C does: temporary files and child processes go first.

    The exit code is 128 + the signal's number. A second signal of a kind kills. The end of a session sends one of
    each kind at once, which must not cut the cleaning up short.
    """
    received: list[int] = []

    def leave(number: int) -> None:
        signal.signal(number, signal.SIG_DFL)
        received.append(number)
        if len(received) == 1:
            sys.exit(128 + number)

    with _handling((signal.SIGTERM, signal.SIGHUP), leave):
        yield


@contextmanager
def _handling(numbers: Iterable[int], act: Callable[[int], None]) -> Iterator[dict[int, Any]]:
    """Call `act` with the number of each signal that the host program leaves to us; yields the former handlers."""
    before: dict[int, Any] = {}
    try:
        for number in filter(_is_ours, numbers):
            before[number] = signal.getsignal(number)
            signal.signal(number, _Handler(act))
    except ValueError:
        # Only the main thread may have handlers.
        before.clear()
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_ours(number: int) -> bool:
    """Return True unless the host program ignores the signal or handles it; C's handlers appear as None."""
    handler = signal.getsignal(number)
    return handler in (signal.SIG_DFL, signal.default_int_handler) or isinstance(handler, _Handler)
