"""coverage.py: nearest-neighbor measures on sets whose answer is known by hand or by brute force."""

import numpy as np
import pytest
import torch

from vglann_fast.errors import VglannError
from vglann_fast.metrics import prdc
from vglann_fast.metrics.prdc import density_coverage, nearest_distances, precision_recall


def normal(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def by_hand(real, made, k):
    """Precision, recall, density and coverage as their papers write them, one pair at a time."""

    def radius(rows, i):
        return sorted(np.linalg.norm(rows[i] - row) for row in rows)[k]

    def ball(rows, i, point):
        return np.linalg.norm(rows[i] - point) <= radius(rows, i)

    inside = [[ball(real, i, m) for i in range(len(real))] for m in made]
    back = [[ball(made, j, r) for j in range(len(made))] for r in real]
    return (
        np.mean([any(row) for row in inside]),
        np.mean([any(row) for row in back]),
        np.sum(inside) / (k * len(made)),
        np.mean(np.any(inside, axis=0)),
    )


@pytest.mark.parametrize("k", [1, 3])
def test_as_the_papers_write_it(k, monkeypatch):
    monkeypatch.setattr(prdc, "_CHUNK", 7)
    real, made = normal(31, 3), normal(26, 3, seed=1) * 0.7 + 0.4
    found = (*precision_recall(real, made, k), *density_coverage(real, made, k))
    np.testing.assert_allclose(found, by_hand(real, made, k), rtol=1e-12)


def test_numbers_on_a_line():
    real, made = np.array([[0.0], [1.0], [2.0], [10.0]]), np.array([[0.5], [0.6], [19.0]])
    # radii to the first neighbor: 1, 1, 1, 8 and 0.1, 0.1, 18.4
    assert precision_recall(real, made, k=1) == (2 / 3, 3 / 4)  # 19 is 9 from 10; 10 is 9 from 19, 0 is not
    density, covered = density_coverage(real, made, k=1)
    assert density == pytest.approx(4 / 3)  # 0.5 and 0.6 lie in two balls each
    assert covered == 0.5


def test_equal_sets_and_far_sets():
    real = normal(60, 5)
    assert precision_recall(real, real[::-1].copy(), k=3) == (1.0, 1.0)
    assert density_coverage(real, real[::-1].copy(), k=5) == (1.0, 1.0)
    assert precision_recall(real, real + 100, k=3) == (0.0, 0.0)
    assert density_coverage(real, real + 100, k=5) == (0.0, 0.0)


def test_a_sampler_of_one_mode_has_precision_but_no_recall():
    real = np.concatenate([normal(100, 4), normal(100, 4, seed=1) + 50])
    precision, recall = precision_recall(real, normal(200, 4, seed=2), k=3)
    assert precision > 0.8
    assert recall < 0.6
    assert density_coverage(real, normal(200, 4, seed=2))[1] < 0.55


def test_density_of_one_distribution_is_one():
    density, covered = density_coverage(normal(600, 2), normal(600, 2, seed=1))
    assert density == pytest.approx(1, abs=0.1)
    assert covered > 0.9


def test_a_copy_is_at_distance_zero_however_large_the_numbers():
    rows = torch.from_numpy(normal(40, 6)) * 1e-3 + 1e6
    assert nearest_distances(rows[5:9], rows).tolist() == [0] * 4
    expected = [min(np.linalg.norm(a - b) for b in rows[9:].numpy()) for a in rows[:9].numpy()]
    np.testing.assert_allclose(nearest_distances(rows[:9], rows[9:]), expected, rtol=1e-9)


@pytest.mark.parametrize("measure", [precision_recall, density_coverage])
@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (normal(9, 4)[0], normal(9, 4), "expected"),
        (normal(9, 4), normal(9, 5), "real features have 4 numbers, generated ones 5"),
        (normal(3, 4), normal(9, 4), "3 neighbors need more than 3 videos, got 3 and 9"),
        (normal(9, 4), normal(9, 4) * np.nan, "NaN"),
    ],
)
def test_errors(measure, real, generated, message):
    with pytest.raises(VglannError, match=message):
        measure(real, generated, 3)
