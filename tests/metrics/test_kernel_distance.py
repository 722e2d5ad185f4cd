"""The kernel distance against its definition, and what it says of sets with a known answer."""

import numpy as np
import pytest
import torch

from vglann_fast.errors import VglannError
from vglann_fast.metrics import kernel_distance as module
from vglann_fast.metrics.kernel_distance import jedi_distance, kernel_distance


def rows(n, d, seed, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1.0, (n, d))


def mean_of_pairs(x, y, kernel, different):
    """A double loop over the rows."""
    values = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(y) if not different or i != j]
    return sum(values) / len(values)


def test_it_is_the_double_loop(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7)
    x, y = rows(23, 5, 0), rows(31, 5, 1, shift=0.5)

    def kernel(a, b):
        return (float(a @ b) / 5 + 1) ** 3

    parts = [mean_of_pairs(*pair, kernel, pair[0] is pair[1]) for pair in ((x, x), (y, y), (x, y))]
    expected = parts[0] + parts[1] - 2 * parts[2]
    assert kernel_distance(x, y)["mmd"] == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_jedi_is_the_double_loop_of_its_own_kernel(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7)
    x, y = rows(23, 5, 0), rows(31, 5, 1, shift=0.5)

    def kernel(a, b):
        return (float(a @ b) / 5) ** 2

    parts = [mean_of_pairs(*pair, kernel, different=False) for pair in ((x, x), (y, y), (x, y))]
    expected = 100 * (parts[0] + parts[1] - 2 * parts[2])
    assert jedi_distance(x, y) == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert jedi_distance(x, x) == pytest.approx(0, abs=1e-10)


def test_no_block_of_the_kernel_is_larger_than_a_chunk_of_rows(monkeypatch):
    """So 10,000 rows against 10,000 take 40 MB, and not 800."""
    seen, kernel = [], module.cubic_kernel
    monkeypatch.setattr(module, "cubic_kernel", lambda x, y: seen.append(len(x)) or kernel(x, y))
    kernel_distance(rows(1500, 2, 0), rows(1100, 2, 1))
    assert max(seen) == 512


def test_thousands_of_rows_on_each_side():
    x, y = rows(4_000, 2, 0), rows(4_000, 2, 1)
    found = kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert abs(found["mmd"]) < 5 * found["mmd_error"] < 0.2


def test_equal_distributions_are_at_zero_whatever_n_is():
    for n in (20, 60):
        values = [kernel_distance(rows(n, 8, 2 * i), rows(n, 8, 2 * i + 1))["mmd"] for i in range(60)]
        assert abs(np.mean(values)) < 4 * np.std(values) / 60**0.5
        assert min(values) < 0 < max(values)


def test_a_shift_of_the_mean_is_many_errors_away_from_zero():
    near, far = (kernel_distance(rows(200, 64, 0), rows(200, 64, 1, shift)) for shift in (0.0, 0.5))
    assert abs(near["mmd"]) < 3 * near["mmd_error"]
    assert far["mmd"] > 8 * far["mmd_error"]


def test_the_error_is_not_too_small():
    found = [kernel_distance(rows(100, 4, 2 * i), rows(100, 4, 2 * i + 1)) for i in range(40)]
    assert np.std([one["mmd"] for one in found]) < 1.2 * np.mean([one["mmd_error"] for one in found])


def test_of_nineteen_rows_there_is_no_error():
    assert kernel_distance(rows(19, 3, 0), rows(40, 3, 1))["mmd_error"] is None
    assert kernel_distance(rows(20, 3, 0), rows(40, 3, 1))["mmd_error"] > 0


def clustered(seed, shots=30, clips=20, d=8):
    """Clips of shots, in random order: the row of the shot and a little of its own, of variance 1 as `rows` has."""
    random = np.random.default_rng(seed)
    numbers = random.permutation(np.repeat(np.arange(shots), clips))
    own = random.normal(0, 0.3, (shots * clips, d))
    return random.normal(0, 0.91**0.5, (shots, d))[numbers] + own, torch.from_numpy(numbers)


@pytest.fixture(scope="module")
def of_shots():
    """Distances of clips of shots and independent samples of one distribution, with the shots and without."""
    found = {"known": [], "unknown": []}
    for i in range(40):
        real, shots = clustered(2 * i)
        made = rows(len(real), 8, 2 * i + 1)
        found["known"].append(kernel_distance(real, made, shots))
        found["unknown"].append(kernel_distance(real, made))
    return found


def test_with_the_shots_known_equal_distributions_are_at_zero(of_shots):
    known, unknown = ([one["mmd"] for one in found] for found in of_shots.values())
    assert abs(np.mean(known)) < 4 * np.std(known) / 40**0.5
    # Pairs of one shot raise the distance of every draw.
    assert np.mean(unknown) > 4 * np.std(unknown) / 40**0.5


def test_with_the_shots_known_the_error_is_not_too_small(of_shots):
    spread = np.std([one["mmd"] for one in of_shots["known"]])
    assert spread < 1.2 * np.mean([one["mmd_error"] for one in of_shots["known"]])
    assert spread > 1.2 * np.mean([one["mmd_error"] for one in of_shots["unknown"]])


def test_pairs_of_one_shot_are_left_out(monkeypatch):
    """By a double loop, of shots of different sizes that do not lie together."""
    monkeypatch.setattr(module, "_CHUNK", 4)
    x, y, shots = rows(9, 3, 0), rows(7, 3, 1), [4, 0, 4, 7, 0, 4, 4, 9, 7]

    def kernel(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    within = np.mean([kernel(x[i], x[j]) for i in range(9) for j in range(9) if shots[i] != shots[j]])
    parts = [mean_of_pairs(*pair, kernel, pair[0] is pair[1]) for pair in ((y, y), (x, y))]
    found = kernel_distance(x, y, torch.tensor(shots))
    assert found["mmd"] == pytest.approx(within + parts[0] - 2 * parts[1], rel=1e-10)


def test_shots_count_on_either_side():
    (x, shots), (y, others) = clustered(0), clustered(1)
    found = kernel_distance(x, y, shots, others)
    assert found == pytest.approx(kernel_distance(y, x, others, shots), rel=1e-9)
    # The training clips that stand for generated ones are of shots, too; their pairs raised the distance.
    assert found["mmd"] < kernel_distance(x, y, shots)["mmd"] < kernel_distance(x, y)["mmd"]


def test_of_nineteen_shots_there_is_no_error_and_of_twenty_uneven_ones_there_is():
    y = rows(40, 3, 1)
    assert kernel_distance(rows(57, 3, 0), y, torch.arange(57) % 19)["mmd_error"] is None
    uneven = torch.cat([torch.arange(20), torch.zeros(30, dtype=torch.int64)])
    assert kernel_distance(rows(50, 3, 0), y, uneven)["mmd_error"] > 0


def test_rows_that_are_all_of_one_shot_are_taken_as_independent():
    x, y = rows(30, 3, 0), rows(30, 3, 1)
    assert kernel_distance(x, y, torch.zeros(30, dtype=torch.int64)) == kernel_distance(x, y)


@pytest.mark.parametrize("n", [0, 1])
def test_one_row_is_too_few(n):
    with pytest.raises(VglannError, match="at least 2 generated videos, got"):
        kernel_distance(rows(5, 3, 0), rows(n, 3, 1))


def test_other_shapes_and_overflow_are_named():
    with pytest.raises(VglannError, match="real features have 3 numbers, generated ones 4"):
        kernel_distance(rows(5, 3, 0), rows(5, 4, 1))
    with pytest.raises(VglannError, match="overflows"):
        kernel_distance(1e150 * rows(5, 3, 0), rows(5, 3, 1))
