"""Checks of arguments of the Python interface. The command line's parser makes the same checks of its own."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from vglann_fast.errors import VglannError
from vglann_fast.options.fields import require

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}


def check_names(given: Iterable[str], known: Iterable[str], command: str) -> None:
    """Raise `VglannError` for a name that is not known, with the known name that is nearest.

    Args:
        given, known: names of options.
        command: the command of `vglann` that has them, for the message.
    """
    known = list(known)
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            remedy = f"did you mean {nearest[0]}?" if nearest else f"`vglann {command} --help` lists them"
            raise VglannError(f"{name}: `vglann {command}` has no such option; {remedy}")


def typed(given: Mapping[str, Any], defaults: Any) -> dict[str, Any]:
    """Return `given` as values of the types that the fields of the dataclass `defaults` have.

    NumPy's numbers become Python's, and whole numbers are taken for floats. Raises `VglannError` for other types.
    Names that are not fields are left as they are.
    """
    kinds = {field.name: type(field.default) for field in fields(defaults)}
    return {name: _typed(name, value, kinds.get(name)) for name, value in given.items()}


def _typed(name: str, value: Any, kind: type | None) -> Any:
    accepted = {bool: bool, int: Integral, float: Real, str: str}.get(kind) if kind else None
    if kind is None or accepted is None:
        return value
    right = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    require(right, name, _KINDS[kind], repr(value))
    return kind(value)


def whole(name: str, value: Any, lowest: int, highest: int) -> int:
    """Return `value` as an int. Raises `VglannError` unless it is a whole number from `lowest` to `highest`."""
    right = isinstance(value, Integral) and not isinstance(value, bool) and lowest <= int(value) <= highest
    require(right, name, f"a whole number from {lowest:,} to {highest:,}", repr(value))
    return int(value)


def checked_seed(seed: Any) -> int:
    """Return `seed` as an int. Raises `VglannError` unless it is a whole number from 0 to below 2^63."""
    return whole("seed", seed, 0, 2**63 - 1)


def words(names: str | Iterable[str]) -> list[str]:
    """Return a list of names: `names` itself, or a string split at its commas as on the command line."""
    return [name for name in names.split(",") if name] if isinstance(names, str) else list(names)
