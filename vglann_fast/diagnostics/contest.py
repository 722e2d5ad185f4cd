"""Contests between ways to compute the same thing: checked first, then timed interleaved, then one is chosen.

Rounds are interleaved, so what else the machine does meets all contenders alike. A contender's factor is the median
over the rounds of the default's time divided by its own. It is chosen in place of the default if it is faster by more
than noise, and in all rounds but one: on a busy machine the median alone would choose by chance. The clock is an
argument, so all of this can be tested.

All contenders that are still timed are in memory together: interleaved rounds need every one of them in each round.
Making them again for each round would take longer than the rounds, since they compile, warm up or capture a graph.
Pairs of the default and one contender would need two at a time, but then contenders are compared across minutes, in
which the machine does other things. So a contender is freed as early as it can be: when it is refused, when it fails,
and when it is too slow to be timed again.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from vglann_fast.errors import VglannError
from vglann_fast.runtime.measurements import Contest

# A lap is as many calls as fill `LAP_SECONDS`, up to `MOST_CALLS`.
ROUNDS, FEWEST_ROUNDS, LAP_SECONDS, MOST_CALLS = 7, 3, 0.2, 50
# A contender is chosen in place of the default from this factor on: less may be noise. Another precision, which
# changes digits, has to be worth more.
LEAST_FACTOR, LEAST_FACTOR_OF_PRECISION = 1.03, 1.1
# A contender with less than this part of the default's speed in its first lap is not timed again.
HOPELESS = 0.5
MAX_REASON = 200

# Computes the given number of times.
Lap = Callable[[int], object]
# Checks that a contender computes the right thing and warms it up. Raises `Refused`, or whatever stops it. The stack
# is closed when the contender leaves.
Prepare = Callable[[ExitStack], Lap]
# Seconds, after everything that was started before has ended.
Clock = Callable[[], float]

T = TypeVar("T")


class Refused(Exception):
    """A contender does not compute what the reference computes, or cannot compute; the message says why.

    lap: its computations, if it has any. By these a default that is refused is still timed.
    """

    def __init__(self, message: str, lap: Lap | None = None) -> None:
        super().__init__(message)
        self.lap = lap


class NoTime(Exception):
    """The time is over before all contenders of a contest were timed often enough."""


class Stopped(Exception):
    """Nothing more can be measured, as after an illegal memory access on a GPU; the message says why."""


@dataclass
class _Contender:
    """One contender: its computations, what it holds, and whether memory was given back since it last computed."""

    held: ExitStack
    lap: Lap | None = None
    cold: bool = False


class _Present:
    """The contenders that hold something, and the reasons of those that were left out.

    release: called after a contender has left, with nothing holding it any more.
    """

    def __init__(self, release: Callable[[], object]) -> None:
        self.left_out: dict[str, str] = {}
        self._contenders: dict[str, _Contender] = {}
        self._release = release

    def racing(self) -> list[str]:
        """Return the names of all that are there."""
        return list(self._contenders)

    def enter(self, name: str, prepare: Prepare, *, default: bool) -> None:
        """Prepare a contender; one that raises is left out. A default that is refused stays, if it can compute."""
        contender = self._contenders[name] = _Contender(ExitStack())
        reason = ""
        try:
            contender.lap = prepare(contender.held)
        except Exception as error:  # the others may run
            reason = _reason(error)
            if default and isinstance(error, Refused):
                contender.lap = error.lap
        # Here the error is gone, whose traceback holds what was prepared.
        if reason:
            self.left_out[name] = reason
        if contender.lap is None:
            # Nothing may refer to it when memory is given back.
            del contender
            self.leave(name)

    def seconds(self, name: str, calls: int, clock: Clock) -> float | None:
        """Return the seconds of one call, of `calls` in a row; never 0, as a coarse clock may have it.

        A contender that raises is left out, without a time. The first call after memory was given back takes longer,
        so it is not timed.
        """
        try:
            contender = self._contenders[name]
            assert contender.lap is not None
            if contender.cold:
                contender.lap(1)
                contender.cold = False
            started = clock()
            contender.lap(calls)
            return max(1e-9, (clock() - started) / calls)
        except Exception as error:  # the others may run
            self.left_out[name] = _reason(error)
        # Nothing may refer to it when memory is given back.
        del contender
        self.leave(name)
        return None

    def leave(self, name: str) -> None:
        """Free what a contender holds. Raises `Stopped` where memory cannot be given back."""
        _unless_stopped(self._contenders.pop(name).held.close)
        _unless_stopped(self._release)
        for contender in self._contenders.values():
            contender.cold = True

    def leave_all(self) -> None:
        """Free what all contenders hold, also after one that cannot be freed; raises `Stopped` then."""
        with ExitStack() as ended:
            ended.callback(_unless_stopped, self._release)
            while self._contenders:
                ended.callback(_unless_stopped, self._contenders.popitem()[1].held.close)


def contest(
    contenders: Mapping[str, Prepare],
    clock: Clock,
    *,
    rounds: int = ROUNDS,
    deadline: float = math.inf,
    least: float = LEAST_FACTOR,
    release: Callable[[], object] = lambda: None,
) -> Contest:
    """Return the outcome among contenders by name, the default first.

    A contender that is refused or raises is left out with its reason, and the others are timed. A default that is
    refused is timed, too, since a training computes by it: only what is right and faster replaces it. If the default
    cannot compute, the fastest of the others is chosen, without factors. If no other can either, the choice is "".

    deadline: on `clock`; no round begins after it. least: factor from which on the default is replaced.
    release: called whenever a contender has left; it gives memory back that nothing holds any more.

    Raises `NoTime` where fewer than three rounds were held before the deadline, and `Stopped` where the clock or
    `release` raises.
    """
    default = next(iter(contenders))
    present = _Present(release)
    with ExitStack() as ended:
        ended.callback(present.leave_all)
        for name, prepare in contenders.items():
            if _unless_stopped(clock) >= deadline:
                raise NoTime
            present.enter(name, prepare, default=name == default)
        times = _timed(present, clock, rounds, deadline)
    left_out = present.left_out
    if not times:
        return Contest(default, "", {}, {}, left_out)
    seconds = {name: median(own) for name, own in times.items()}
    if default not in times:
        return Contest(default, min(seconds, key=lambda name: seconds[name]), seconds, {}, left_out)
    ratios = {name: [b / t for b, t in zip(times[default], own, strict=False)] for name, own in times.items()}
    factors = {name: median(own) for name, own in ratios.items()}
    better = [name for name in factors if factors[name] >= least and sum(r <= 1 for r in ratios[name]) <= 1]
    choice = max(better, key=lambda name: factors[name], default=default)
    return Contest(default, choice, seconds, factors, left_out)


def failure(prepare: Prepare, release: Callable[[], object]) -> str:
    """Return the reason why a contender would be left out of a contest, or "". Raises `Stopped` as `contest`."""
    present = _Present(release)
    with ExitStack() as ended:
        ended.callback(present.leave_all)
        present.enter("", prepare, default=False)
    return present.left_out.get("", "")


def _timed(present: _Present, clock: Clock, rounds: int, deadline: float) -> dict[str, list[float]]:
    """Return the seconds of a call by contender, one for each round; contenders without hope have fewer."""
    racing = present.racing()
    # Before the rounds, one call each says how many fill a lap.
    calls = dict.fromkeys(racing, 1)
    times: dict[str, list[float]] = {name: [] for name in racing}
    for number in range(rounds + 1):
        if _unless_stopped(clock) >= deadline:
            if number <= FEWEST_ROUNDS:
                raise NoTime
            break
        for name in racing:
            seconds = present.seconds(name, calls[name], clock)
            if seconds is None:
                del times[name]
            elif number == 0:
                calls[name] = _calls(seconds)
            else:
                times[name].append(seconds)
        racing = [name for name in racing if name in times]
        for name in [name for name in racing if not _has_hope(times[name], times)]:
            racing.remove(name)
            present.leave(name)
        # Another one begins each round: none always follows the same one.
        if number:
            racing = [*racing[1:], *racing[:1]]
    return times


def _unless_stopped(call: Callable[[], T]) -> T:
    """Return what a call returns. Raises `Stopped` where it raises: it is not a contender that fails then."""
    try:
        return call()
    except Exception as error:
        raise Stopped(_reason(error)) from error


def _has_hope(own: list[float], times: Mapping[str, list[float]]) -> bool:
    """Return True for the default, which is first and is always timed, and for what is not far slower."""
    default = next(iter(times.values()))
    return own is default or not own or default[0] / own[0] >= HOPELESS


def _calls(seconds: float) -> int:
    return max(1, min(MOST_CALLS, math.ceil(LAP_SECONDS / seconds)))


def _reason(error: Exception) -> str:
    """Return what an error says in one line that a terminal can show."""
    text = " ".join(str(error).split())
    if not isinstance(error, Refused | VglannError):
        text = f"{type(error).__name__}: {text}"
    return "".join(c for c in text if c.isprintable())[:MAX_REASON]
