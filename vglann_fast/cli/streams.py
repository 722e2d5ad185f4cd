"""Standard streams as a command finds them: closed, without a terminal, of few letters, or set by a host program.

What a command prints is about work that is done, so no alphabet and no closed stream may turn it into a failure.
"""

import codecs
import io
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from vglann_fast.progress import say

LOGGERS = ("vglann_fast", "vglann_kernels")

_lock = threading.Lock()
_open_blocks = 0
_restored = ExitStack()


class _Messages(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


@contextmanager
def usable_streams() -> Iterator[None]:
    """Let any text be printed inside the block, and show the log; afterwards the host's streams are as they were.

    Characters that the stream cannot encode become escapes; bytes of file names come out as they are. A stream that
    is missing or closed is replaced by one that forgets. The log goes to standard error, unless the host program has
    configured logging. Blocks may be open in several threads at a time.
    """
    global _open_blocks
    with _lock:
        if _open_blocks == 0:
            _prepare(_restored)
        _open_blocks += 1
    try:
        yield
    finally:
        with _lock:
            _open_blocks -= 1
            if _open_blocks == 0:
                _restored.close()


def abandon_broken_streams() -> None:
    """Forget what a broken stream still holds: Python would try to write it at its end, and fail once more."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _prepare(restored: ExitStack) -> None:
    _occupy_closed_descriptors()
    _replace_errors(restored, "stdout", "vglann-printable")
    _replace_errors(restored, "stderr", "backslashreplace")
    if logging.getLogger().handlers:
        return
    handler = _Messages()
    for logger in map(logging.getLogger, LOGGERS):
        restored.callback(logger.setLevel, logger.level)
        restored.callback(logger.removeHandler, handler)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)


def _occupy_closed_descriptors() -> None:
    """Open /dev/null in place of closed standard streams: the next file would get their number and their output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _replace_errors(restored: ExitStack, name: str, errors: str) -> None:
    stream: Any = getattr(sys, name)
    if stream is None or getattr(stream, "closed", False):
        restored.callback(setattr, sys, name, stream)
        nowhere = restored.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (the stack closes it)
        setattr(sys, name, nowhere)
    elif isinstance(stream, io.TextIOWrapper):
        restored.callback(_reconfigure, stream, stream.errors)
        _reconfigure(stream, errors)


def _reconfigure(stream: io.TextIOWrapper, errors: str | None) -> None:
    # It flushes first, which fails where the stream is broken; then errors of encoding no longer matter.
    with suppress(OSError, ValueError):
        stream.reconfigure(errors=errors)


def _printable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode one character that a stream has no place for: a byte of a file name as that byte, others as escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character, end = error.object[error.start], error.start + 1
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), end
    return character.encode("ascii", "backslashreplace").decode(), end


codecs.register_error("vglann-printable", _printable)
