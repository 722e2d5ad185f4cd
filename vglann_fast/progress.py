"""Progress of a long job: a bar on a terminal, otherwise a logged line now and then."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

LINE_SECONDS = 5.0  # between logged lines

log = logging.getLogger("vglann_fast")


def say(text: str) -> None:
    """Print a line on standard error. A stream that is missing, closed or full must not end the work."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def _is_terminal(stream: Any) -> bool:
    """Return True if the stream says so; a host program's own stream may not even have the question."""
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):
        return False


class Progress:
    """Counts `total` units on standard error; use as a context manager. Not `shown`, it counts in silence."""

    def __init__(self, name: str, total: int, unit: str, done: int = 0, *, shown: bool = True) -> None:
        from tqdm import tqdm

        self._name, self._total, self._unit, self._done = name, total, unit, done
        self._first, self._started, self._line_at = done, time.monotonic(), 0.0
        self._shown = shown
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit=unit,
            disable=not (shown and _is_terminal(sys.stderr)),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self) -> None:
        """One more unit is done."""
        self._done += 1
        self._bar.update()

    def show(self, **figures: float) -> None:
        """Show the latest figures; as a logged line at most every few seconds, and at the end."""
        if not self._shown:
            return
        text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
            return
        now = time.monotonic()
        if now - self._line_at < LINE_SECONDS and self._done < self._total:
            return
        self._line_at = now
        rate = (self._done - self._first) / max(now - self._started, 1e-9)
        parts = [f"{self._unit} {self._done}/{self._total}", text, f"{rate:.3g} {self._unit}s/s"]
        log.info("%s: %s", self._name, ", ".join(filter(None, parts)))


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Let these loggers say warnings only, inside the block."""
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
