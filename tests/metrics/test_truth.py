"""The truth row: halves by whole shots, figures as they are defined, and which source is called nearest."""

import pytest
import torch

from vglann_fast.metrics.judgment import SPREAD_FIGURES, nearest_to_truth
from vglann_fast.metrics.kernel_distance import kernel_distance
from vglann_fast.metrics.prdc import density_coverage, precision_recall
from vglann_fast.metrics.truth import SPLITS, Truth


def rows(n, d, seed, scale=1.0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_figures_are_those_of_two_halves():
    """Of two shots there is one way to split them."""
    real = rows(24, 6, 0)
    shots = torch.tensor([5] * 12 + [9] * 12)
    found = Truth(real, shots).figures()
    assert (found["n"], found["splits"]) == (12, SPLITS)
    ways = []
    for a, b in ((real[:12], real[12:]), (real[12:], real[:12])):
        shares = (*precision_recall(a, b, 3), *density_coverage(a, b, 5))
        ways.append([kernel_distance(a, b)["mmd"], *shares])
    for i, name in enumerate(SPREAD_FIGURES):
        low, high = sorted(way[i] for way in ways)
        assert low - 1e-9 <= found[name]["mean"] <= high + 1e-9, name


def test_a_source_that_is_all_used_has_the_figures_of_its_definition():
    real, made = rows(24, 6, 0), rows(12, 6, 1)
    shots = torch.tensor([0] * 12 + [1] * 12)
    found = Truth(real, shots).figures_of(made)
    ways = [kernel_distance(half, made)["mmd"] for half in (real[:12], real[12:])]
    assert min(ways) - 1e-9 <= found["mmd"]["mean"] <= max(ways) + 1e-9
    ways = [density_coverage(half, made, 5)[1] for half in (real[:12], real[12:])]
    assert min(ways) - 1e-9 <= found["coverage"]["mean"] <= max(ways) + 1e-9


def test_no_shot_is_on_both_sides():
    """Clips of one shot are equal here: were a shot split, a clip would lie on its copy."""
    real = rows(15, 4, 0).repeat_interleave(4, 0)
    whole = Truth(real, torch.arange(15).repeat_interleave(4)).figures()
    split = Truth(real).figures()
    assert whole["precision"]["mean"] < 0.5 < split["precision"]["mean"]


def test_clips_that_are_alike_do_not_raise_the_kernel_distance_between_halves():
    shots = torch.arange(30).repeat(6)
    real = rows(30, 8, 0)[shots] + rows(180, 8, 1, scale=0.3)
    truth = Truth(real, shots)
    found, made = truth.figures()["mmd"], truth.figures_of(rows(180, 8, 2, scale=1.09**0.5))["mmd"]
    assert abs(found["mean"]) < found["sd"]
    # With the pairs of one shot both are more than two standard deviations above 0.
    assert abs(made["mean"]) < 2 * made["sd"]


def test_a_source_of_clips_that_are_alike_needs_its_shots():
    real, shots = rows(180, 8, 2, scale=1.09**0.5), torch.arange(30).repeat(6)
    made = rows(30, 8, 0)[shots] + rows(180, 8, 1, scale=0.3)
    truth = Truth(real)
    known, unknown = truth.figures_of(made, shots)["mmd"], truth.figures_of(made)["mmd"]
    assert abs(known["mean"]) < 2 * known["sd"]
    assert unknown["mean"] > known["mean"] + known["sd"]


def test_the_truth_compared_with_itself_is_within_its_spread():
    real, made = rows(200, 8, 0), rows(200, 8, 1)
    truth = Truth(real)
    record, same, narrow = truth.figures(), truth.figures_of(made), truth.figures_of(0.5 * made)
    assert abs(same["coverage"]["mean"] - record["coverage"]["mean"]) < 3 * record["coverage"]["sd"]
    # Samples that gather in the middle lie in more balls than real ones.
    assert narrow["density"]["mean"] > record["density"]["mean"] + 3 * record["density"]["sd"]
    assert narrow["mmd"]["mean"] > record["mmd"]["mean"] + 3 * record["mmd"]["sd"]


def test_of_rows_in_the_order_of_their_sources_all_sources_take_part():
    """5,000 rows, the second half far from the first: both are in the truth and in the figures of a copy of it."""
    real = rows(5000, 2, 0)
    real[2500:] += 20
    shots = torch.arange(1000).repeat_interleave(5)
    for truth in (Truth(real, shots, most=40), Truth(real, most=40)):
        near, copy = truth.figures_of(real[:2500])["coverage"], truth.figures_of(real)["coverage"]
        assert truth.figures()["coverage"]["mean"] > 0.8
        # Samples of the first source alone cover half of the real ones.
        assert near["mean"] < 0.65
        assert copy["mean"] > 0.8


def test_no_shot_is_on_both_sides_of_more_rows_than_take_part():
    """Clips of one shot are equal here: were a shot split, a clip would lie on its copy."""
    real, shots = rows(60, 4, 0).repeat(50, 1), torch.arange(60).repeat(50)
    assert Truth(real, shots, most=300).figures()["precision"]["mean"] < 0.1


def test_halves_too_small_for_five_neighbors_are_said_to_be():
    assert not Truth(rows(11, 3, 0)).enough
    assert Truth(rows(12, 3, 0)).enough
    assert not Truth(rows(40, 3, 0), torch.zeros(40, dtype=torch.int64)).enough
    assert Truth(rows(40, 3, 0), most=7).n == 7


def test_the_nearest_to_the_truth_is_best_and_not_the_largest():
    truth = {"mean": 0.76, "sd": 0.02}
    assert nearest_to_truth(truth, {"imle": 0.88, "drifting": 0.80}) == {"drifting"}
    assert nearest_to_truth(truth, {"imle": 0.88, "a": 0.77, "b": 0.745}) == {"a", "b"}
    assert nearest_to_truth(truth, {}) == set()
    assert nearest_to_truth(truth, {"imle": 0.88}) == set()
    assert nearest_to_truth(truth, {"imle": 0.77}) == {"imle"}


@pytest.mark.parametrize("n", [2, 3])
def test_two_videos_have_no_truth(n):
    assert not Truth(rows(n, 3, 0)).enough
