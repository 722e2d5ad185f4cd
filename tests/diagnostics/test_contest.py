"""Contests between ways to compute: what is chosen, what is left out, and what the clock has to do with it."""

import weakref
from collections import Counter

import pytest
import torch

from vglann_fast.diagnostics.contest import NoTime, Refused, Stopped, contest


class Machine:
    """A clock that contenders move: each call takes as many seconds as it is told."""

    def __init__(self):
        self.now, self.calls, self.order = 0.0, Counter(), []

    def clock(self):
        return self.now

    def way(self, name, *seconds, prepare=0.0, error=None):
        """A contender whose laps take these seconds in turn, the last one ever after."""
        left = list(seconds)

        def lap(count):
            self.calls[name] += 1
            self.order.append(name)
            self.now += count * (left.pop(0) if len(left) > 1 else left[0])

        def ready(held):
            self.now += prepare
            if error is not None:
                raise error
            return lap

        return ready


@pytest.fixture
def machine():
    return Machine()


def test_the_fastest_is_chosen_and_its_factor_is_over_the_default(machine):
    ways = {
        "slow": machine.way("slow", 3.0),
        "plain": machine.way("plain", 2.0),
        "quick": machine.way("quick", 1.0),
    }
    found = contest({"plain": ways["plain"], **ways}, machine.clock)
    assert (found.default, found.choice) == ("plain", "quick")
    assert found.factors == pytest.approx({"plain": 1.0, "slow": 2 / 3, "quick": 2.0})
    assert found.seconds == pytest.approx({"plain": 2.0, "slow": 3.0, "quick": 1.0})


def test_rounds_are_interleaved_and_begin_with_another_contender_each_time(machine):
    names = ("a", "b", "c")
    contest({name: machine.way(name, 1.0) for name in names}, machine.clock, rounds=3)
    rounds = machine.order[3:]  # after one call each, which finds how many fill a lap
    assert ["".join(rounds[i : i + 3]) for i in (0, 3, 6)] == ["abc", "bca", "cab"]


def test_a_difference_that_may_be_noise_changes_nothing(machine):
    found = contest({"plain": machine.way("p", 1.0), "other": machine.way("o", 0.98)}, machine.clock)
    assert found.choice == "plain"
    found = contest(
        {"plain": machine.way("p", 1.0), "other": machine.way("o", 0.92)}, machine.clock, least=1.1
    )
    assert found.choice == "plain"


def test_a_contender_that_loses_two_rounds_is_not_chosen_whatever_its_median(machine):
    lucky = machine.way("lucky", 0.5, 0.5, 0.5, 1.2, 0.5, 1.2, 0.5, 0.5)
    found = contest({"plain": machine.way("plain", 1.0), "lucky": lucky}, machine.clock)
    assert (found.choice, found.factors["lucky"]) == ("plain", 2.0)


def test_one_interruption_does_not_cost_the_choice(machine):
    better = machine.way("better", 0.5, 0.5, 0.5, 60.0, 0.5)
    found = contest({"plain": machine.way("plain", 1.0), "better": better}, machine.clock)
    assert (found.choice, found.factors["better"]) == ("better", 2.0)


def test_what_is_wrong_is_never_chosen_and_is_named(machine):
    wrong = machine.way("wrong", 0.1, error=Refused("its loss differs by 0.5"))
    found = contest({"plain": machine.way("plain", 1.0), "wrong": wrong}, machine.clock)
    assert (found.choice, found.left_out) == ("plain", {"wrong": "its loss differs by 0.5"})
    assert "wrong" not in found.seconds


def test_a_contender_out_of_memory_is_one_line_and_the_others_are_timed(machine):
    full = machine.way("full", 0.1, error=MemoryError("no\nroom \x1b[31m"))
    ways = {"plain": machine.way("plain", 2.0), "full": full, "quick": machine.way("quick", 1.0)}
    found = contest(ways, machine.clock)
    assert found.choice == "quick"
    assert found.left_out == {"full": "MemoryError: no room [31m"}


def test_a_contender_that_fails_while_it_is_timed_is_left_out(machine):
    def failing(held):
        laps = iter([None, None])

        def lap(count):
            machine.now += 0.1
            next(laps)

        return lap

    ways = {"plain": machine.way("plain", 1.0), "failing": failing, "quick": machine.way("quick", 0.5)}
    found = contest(ways, machine.clock)
    assert (found.choice, found.left_out.keys()) == ("quick", {"failing"})
    assert found.seconds.keys() == {"plain", "quick"}
    found = contest({"failing": failing, "plain": ways["plain"]}, machine.clock)
    assert (found.choice, found.factors) == ("plain", {})


def test_a_default_that_cannot_run_is_replaced_without_a_factor(machine):
    wrong = machine.way("plain", 0.1, error=Refused("wrong"))
    ways = {"plain": wrong, "slow": machine.way("slow", 2.0), "quick": machine.way("quick", 1.9)}
    found = contest(ways, machine.clock)
    assert (found.choice, found.factors) == ("quick", {})
    assert contest({"plain": wrong}, machine.clock).choice == ""


def refused(way):
    """A contender that can compute, and computes something else."""

    def prepare(held):
        raise Refused("its loss differs by 0.5", way(held))

    return prepare


@pytest.mark.parametrize(("seconds", "choice"), [(1.9, "plain"), (2.0, "plain"), (1.0, "right")])
def test_a_default_that_is_wrong_is_replaced_only_by_what_is_right_and_faster(machine, seconds, choice):
    ways = {
        "plain": refused(machine.way("plain", 1.9)),
        "wrong": refused(machine.way("wrong", 0.1)),
        "right": machine.way("right", seconds),
    }
    found = contest(ways, machine.clock)
    assert (found.choice, found.left_out.keys()) == (choice, {"plain", "wrong"})
    assert found.factors == pytest.approx({"plain": 1.0, "right": 1.9 / seconds})


def test_a_contender_without_hope_is_timed_once(machine):
    ways = {"plain": machine.way("plain", 1.0), "crawling": machine.way("crawling", 3.0)}
    found = contest(ways, machine.clock, rounds=5)
    # The default computes once more after the other one has left.
    assert (machine.calls["plain"], machine.calls["crawling"]) == (1 + 5 + 1, 1 + 1)
    assert found.factors["crawling"] == pytest.approx(1 / 3)


def test_a_slow_default_is_timed_to_the_end(machine):
    ways = {"plain": machine.way("plain", 5.0), "quick": machine.way("quick", 1.0)}
    assert contest(ways, machine.clock, rounds=5).choice == "quick"
    assert machine.calls["plain"] == 1 + 5


def test_short_calls_fill_a_lap(machine):
    contest({"a": machine.way("a", 0.01), "b": machine.way("b", 0.01)}, machine.clock, rounds=1)
    assert machine.now == pytest.approx(2 * (0.01 + 20 * 0.01))


def test_the_time_may_end_between_rounds_but_not_before_the_third(machine):
    ways = {name: machine.way(name, 1.0) for name in ("a", "b")}
    assert contest(ways, machine.clock, deadline=2 + 2 * 3).seconds
    machine.now = 0.0
    with pytest.raises(NoTime):
        contest(ways, machine.clock, deadline=2 + 2 * 2)
    machine.now = 0.0
    with pytest.raises(NoTime):
        contest(
            {"a": machine.way("a", 1.0, prepare=9.0), "b": machine.way("b", 1.0)}, machine.clock, deadline=5.0
        )


class Holding:
    """Contenders that hold something, and in which order they begin and end."""

    def __init__(self, machine):
        self.machine, self.events, self.alive = machine, [], []

    def way(self, name, *seconds, error=None):
        lap = self.machine.way(name, *seconds)

        def prepare(held):
            self.events.append(f"begin {name}")
            held.callback(self.events.append, f"end {name}")
            something = Machine()
            self.alive.append(weakref.ref(something))
            if error is not None:
                # One that is kept elsewhere would hold this function's variables.
                raise error("tried to allocate 80 GiB")
            run = lap(held)
            return lambda count: (run(count), something)

        return prepare

    def release(self):
        self.events.append(f"release {sum(ref() is not None for ref in self.alive)}")


def test_a_refused_contender_is_free_before_the_next_one_begins(machine):
    holding = Holding(machine)
    ways = {
        "plain": holding.way("plain", 1.0),
        "full": holding.way("full", 1.0, error=torch.OutOfMemoryError),
        "quick": holding.way("quick", 0.5),
    }
    found = contest(ways, machine.clock, release=holding.release)
    assert found.choice == "quick"
    assert holding.events == [
        "begin plain", "begin full", "end full", "release 1", "begin quick",
        "end plain", "end quick", "release 0",
    ]  # fmt: skip


def test_a_contender_that_fails_or_is_hopeless_is_free_while_the_others_are_timed(machine):
    holding = Holding(machine)

    def failing(held):
        lap = holding.way("failing", 0.1)(held)
        laps = iter([1, 1])
        return lambda count: (next(laps), lap(count))

    ways = {"plain": holding.way("plain", 1.0), "failing": failing, "slow": holding.way("slow", 3.0)}
    contest(ways, machine.clock, rounds=3, release=holding.release)
    begun = [f"begin {name}" for name in ways]
    left = ["end slow", "release 2", "end failing", "release 1", "end plain", "release 0"]
    assert holding.events == begun + left
    assert machine.order[-2:] == ["plain", "plain"]


def test_the_first_call_after_memory_was_given_back_is_not_timed(machine):
    released = []

    def plain(held):
        def lap(count):
            machine.now += count + 50.0 * len(released)
            released.clear()

        return lap

    ways = {"plain": plain, "slow": machine.way("slow", 3.0)}
    found = contest(ways, machine.clock, rounds=2, release=lambda: released.append(1))
    assert found.seconds["plain"] == pytest.approx(1.0)


def raise_error(*given):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_device_that_computes_no_more_ends_the_contest_and_frees_all_others(machine):
    """After such an error whatever is asked of the device raises."""
    holding = Holding(machine)
    ways = {
        "plain": holding.way("plain", 1.0),
        "failing": lambda held: raise_error,
        "quick": holding.way("quick", 0.5),
    }
    with pytest.raises(Stopped, match="illegal memory access"):
        contest(ways, machine.clock, release=raise_error)
    assert "end plain" in holding.events
    with pytest.raises(Stopped, match="illegal memory access"):
        contest(ways, raise_error)


def test_one_that_cannot_be_freed_does_not_keep_the_others(machine):
    holding = Holding(machine)

    def stuck(held):
        held.callback(raise_error)
        return machine.way("stuck", 1.0)(held)

    ways = {"a": holding.way("a", 1.0), "stuck": stuck, "b": holding.way("b", 1.0)}
    with pytest.raises(Stopped):
        contest(ways, machine.clock, rounds=1, release=holding.release)
    assert holding.events[-3:] == ["end a", "end b", "release 0"]


def test_what_contenders_hold_is_free_when_no_time_is_left(machine):
    holding = Holding(machine)
    with pytest.raises(NoTime):
        contest({name: holding.way(name, 1.0) for name in "ab"}, machine.clock, deadline=3.0)
    assert {"end a", "end b"} <= set(holding.events)
