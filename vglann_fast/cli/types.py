"""Functions from the text of an argument to its value; their errors say what was expected.

The same functions read the values of a config file and of history.jsonl, so a value means the same everywhere.
"""

from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from typing import Any, get_args

Convert = Callable[[str], Any]
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def whole(least: int | None = None, most: int | None = None) -> Convert:
    """Return a function from text to an int within bounds."""

    def convert(text: str) -> int:
        expected = f"a whole number{_bounds(least, most)}"
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"expected {expected}, got {text!r}") from None
        if (least is not None and value < least) or (most is not None and value > most):
            raise ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    return convert


def real(text: str) -> float:
    """Return the number that the text says."""
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a number, got {text!r}") from None


def positive(text: str) -> float:
    """Return a number above 0."""
    value = real(text)
    if not value > 0:
        raise ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def fraction(text: str) -> float:
    """Return a number from 0 to below 1."""
    value = real(text)
    if not 0 <= value < 1:
        raise ArgumentTypeError(f"expected 0 to below 1, got {text}")
    return value


def boolean(text: str) -> bool:
    """Return what the text says: true or false."""
    if text.lower() not in _TRUE + _FALSE:
        raise ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in _TRUE


def one_of(values: Sequence[str]) -> Convert:
    """Return a function that takes only these texts."""

    def convert(text: str) -> str:
        if text not in values:
            raise ArgumentTypeError(f"expected {alternatives(values)}, got {text!r}")
        return text

    return convert


def names(text: str) -> list[str]:
    """Return the names in "a,b"."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise ArgumentTypeError(f"expected names with commas between them, got {text!r}")
    return found


def place(text: str) -> tuple[int, int]:
    """Return the numbers I and N in "I/N", 1 <= I <= N."""
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise ArgumentTypeError(f"expected I/N with I from 1 to N, got {text!r}")
    return int(number), int(of)


def of_hint(hint: Any) -> Convert:
    """Return the function for a field of an option dataclass."""
    if choices := get_args(hint):
        return one_of(choices)
    converters: dict[Any, Convert] = {bool: boolean, int: whole(), float: real, str: str}
    return converters[hint]


def alternatives(values: Sequence[str]) -> str:
    """Return "a, b or c"."""
    return " or ".join(part for part in (", ".join(values[:-1]), values[-1]) if part)


def _bounds(least: int | None, most: int | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    return "" if least is None else f" of at least {least}"
