"""Check numbers that callers pass, and turn them into plain int, float and bool.

A NumPy scalar or a subclass of int is a number to the caller, but JSON refuses the one, and an exact comparison of
types the other. Options are therefore converted once, where they come in. A bool is not a number here, and a float
is not a whole number, even 2.0.
"""

import math
from numbers import Integral, Real

import numpy as np

from vglann_fast.errors import VglannError


def whole(name: str, value: object, least: int, below: int | None = None) -> int:
    """Return a whole number of at least `least` as an int. Raises `VglannError` with the option's name."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if least <= number and (below is None or number < below):
            return number
    limit = "" if below is None else f" and below {below}"
    raise VglannError(f"{name} must be a whole number of at least {least}{limit}, not {value}")


def real(name: str, value: object, expected: str, least: float, below: float) -> float:
    """Return a finite number, `least` <= number < `below`, as a float.

    Raises `VglannError`, which says that the option must be `expected`.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if least <= number < below:
            return number
    raise VglannError(f"{name} must be {expected}, not {value}")


def place(name: str, value: object) -> tuple[int, int]:
    """Return a pair (I, N), 1 <= I <= N, as int. Raises `VglannError` with the option's name."""
    if not (isinstance(value, tuple | list) and len(value) == 2):
        raise VglannError(f"{name} must be a pair (I, N) with I from 1 to N, not {value!r}")
    of = whole(name, value[1], 1)
    return whole(name, value[0], 1, of + 1), of


def switch(name: str, value: object) -> bool:
    """Return True or False as a bool. Raises `VglannError` for anything else, also 0 and 1."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise VglannError(f"{name} must be True or False, not {value!r}")
