"""The kernel of `guard_step` in the interpreter."""

import itertools

import pytest
import torch
from counted import Traffic
from vglann_kernels import guard_step, verify

OP = torch.ops.vglann_kernels.step_guard.default


def state(words, batch=3):
    return {
        **{name: torch.tensor(False) for name in ("frozen", "mine", "skip")},
        "step": torch.tensor(2**40),
        "rows": torch.full((batch,), -1),
        "found_inf": torch.tensor(float("nan")),
        "words": torch.randint(-(2**31), 2**31, (words,), dtype=torch.int32),
        "kept": torch.randint(-(2**31), 2**31, (words,), dtype=torch.int32),
    }


def test_against_the_reference():
    for line in verify.step_guard(verify.Shapes(device="cpu")):
        assert line.ok, str(line)


LOSSES = (1.0, -3e38, float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("words", [0, 5, 4096, 9001])
def test_every_decision_is_the_references_over_two_steps(words):
    overflows = (None, torch.tensor(False), torch.tensor(True))
    for first, second, own, overflow in itertools.product(
        LOSSES, (1.0, LOSSES[2]), (0.5, LOSSES[3]), overflows
    ):
        states = [state(words)]
        states.append({name: value.clone() for name, value in states[0].items()})
        for impl, each in zip(("triton", "reference"), states, strict=True):
            for number, loss in enumerate((first, second)):
                index = torch.arange(3) + 10 * number
                given = torch.tensor(loss), torch.tensor(own), index
                guard_step(*given, **each, overflow=overflow, impl=impl)
                each["words"] += 1
        for name, ours in states[0].items():
            assert torch.equal(ours, states[1][name]), (name, first, second, own, overflow)


def test_without_words_and_with_many_rows():
    s = state(0, batch=5000)
    del s["words"], s["kept"]
    index = torch.arange(5000)
    guard_step(torch.tensor(float("nan")).half(), torch.tensor(1.0), index, **s, impl="triton")
    assert torch.equal(s["rows"], index)


def test_traffic():
    s = state(1000, batch=8)
    with Traffic() as moved:
        guard_step(torch.tensor(1.0), torch.tensor(1.0), torch.arange(8), **s, impl="triton")
    # The words once in and once out, no rows, and the scalars.
    assert moved.bytes <= 2 * 4 * 1000 + 50


def test_opcheck_and_one_graph():
    s = state(4)
    given = torch.tensor(1.0), torch.tensor(1.0), torch.arange(3)
    names = ("frozen", "mine", "step", "rows", "skip", "found_inf", "words", "kept")
    torch.library.opcheck(OP, (*given, None, *(s[name] for name in names)))

    def function(loss):
        guard_step(loss, given[1], given[2], **s, impl="triton")
        return s["skip"] | False

    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert traced(torch.tensor(float("nan"))).item() is True
    assert s["rows"].tolist() == [0, 1, 2]


def test_float64_is_refused_by_name():
    with pytest.raises(ValueError, match="loss: expected a 16- or 32-bit float, got float64"):
        guard_step(torch.tensor(1.0).double(), torch.tensor(1.0), torch.arange(3), **state(1), impl="triton")
    with pytest.raises(ValueError, match="own: expected a 16- or 32-bit float, got float64"):
        guard_step(
            torch.tensor(1.0), torch.tensor(1e300).double(), torch.arange(3), **state(1), impl="triton"
        )


@pytest.mark.parametrize("name", ["rows", "words", "kept"])
def test_what_is_written_has_to_be_contiguous(name):
    given = state(3)
    given[name] = torch.zeros(6, dtype=given[name].dtype)[::2]
    with pytest.raises(ValueError, match=f"{name}: expected a contiguous tensor"):
        guard_step(torch.tensor(1.0), torch.tensor(1.0), torch.arange(3), **given, impl="triton")
