"""Being told to stop: SIGTERM and SIGINT end a training after the step in progress, and other commands in order."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; the training was saved after the step in progress."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} and saved")
        self.exit_code = 128 + signal_number


@contextmanager
def signals_collected(alone: bool) -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them; a second one of a kind kills as usual.

    Not so in one process of several (`alone` false), where the launcher and the scheduler may each send one. In
    another thread than the main one nothing is collected.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # others cannot have handlers
        yield received
        return

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if alone:
            signal.signal(number, before[number])

    numbers = (signal.SIGTERM, signal.SIGINT)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, remember)
    try:
        yield received
    finally:
        for number in numbers:
            signal.signal(number, before[number])


@contextmanager
def terminated_in_order() -> Iterator[None]:
    """Let SIGTERM end the program as Ctrl-C does, with exit code 143: temporary files and child processes go first.

    A second SIGTERM kills.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # others cannot have handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
