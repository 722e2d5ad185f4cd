"""`guard_step`: what it decides, and what it refuses. The kernel: interpreted/step_guard.py."""

import pytest
import torch
from vglann_kernels import guard_step

NAN, INF = float("nan"), float("inf")


def state(batch=3, words=5):
    flags = {name: torch.tensor(False) for name in ("frozen", "mine", "skip")}
    kept = torch.arange(words, dtype=torch.int32)
    return {
        **flags,
        "step": torch.tensor(7),
        "rows": torch.full((batch,), -1),
        "found_inf": torch.tensor(0.0),
        "words": kept + 100,
        "kept": kept.clone(),
    }


def decided(s, loss, own=0.0, index=(4, 5, 6), **options):
    guard_step(torch.tensor(loss), torch.tensor(own), torch.tensor(index), **s, **options)
    return {name: value.tolist() for name, value in s.items()}


def test_a_finite_loss_counts_and_its_words_are_kept():
    after = decided(state(), 1.5)
    assert after == {
        "frozen": False, "mine": False, "skip": False, "step": 8, "rows": [-1] * 3, "found_inf": 0.0,
        "words": [100, 101, 102, 103, 104], "kept": [100, 101, 102, 103, 104],
    }  # fmt: skip


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
@pytest.mark.parametrize("own", [0.0, NAN])
def test_a_loss_that_is_not_finite_freezes_and_puts_words_back(loss, own):
    s = state()
    after = decided(s, loss, own)
    frozen = {
        "frozen": True, "mine": own != 0.0, "skip": True, "step": 7, "rows": [4, 5, 6], "found_inf": 1.0,
        "words": [0, 1, 2, 3, 4], "kept": [0, 1, 2, 3, 4],
    }  # fmt: skip
    assert after == frozen
    s["words"] += 1
    # Later steps change nothing, whatever their loss.
    assert decided(s, 1.0, NAN, (7, 8, 9)) == frozen
    assert decided(s, NAN, NAN, (7, 8, 9)) == frozen


def test_an_overflow_skips_one_step_alone():
    s = state()
    after = decided(s, 1.0, overflow=torch.tensor(True))
    assert (after["skip"], after["found_inf"], after["frozen"], after["step"]) == (True, 1.0, False, 8)
    assert after["kept"] == [100, 101, 102, 103, 104]
    after = decided(s, 1.0, overflow=torch.tensor(False))
    assert (after["skip"], after["found_inf"], after["step"]) == (False, 0.0, 9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.zeros(2).long()}, ValueError, r"rows: expected shape \(3,\), got \(2,\)"),
        ({"frozen": torch.tensor(0)}, TypeError, "frozen: expected bool, got int64"),
        ({"found_inf": torch.tensor(False)}, TypeError, "found_inf: expected float32, got bool"),
        ({"overflow": torch.zeros(1).bool()}, ValueError, r"overflow: expected shape \(\), got \(1,\)"),
        ({"words": torch.zeros(5)}, TypeError, "words: expected int32, got float32"),
        ({"kept": torch.zeros(4).int()}, ValueError, r"kept: expected shape \(5,\), got \(4,\)"),
        ({"kept": None}, ValueError, "expected both or neither"),
        ({"step": torch.zeros((), device="meta").long()}, ValueError, "step: expected device cpu"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        guard_step(torch.tensor(1.0), torch.tensor(1.0), torch.zeros(3).long(), **{**state(), **change})
