"""frechet.py: recorded values, properties that hold by definition, and every error and warning."""

import numpy as np
import pytest
import torch
from golden_data import golden

from vglann_fast.errors import VglannError
from vglann_fast.metrics.frechet import FeatureMoments, frechet_distance, frechet_warnings

RECORDED = golden("frechet")
CASES = sorted({key.split(".")[0] for key in RECORDED})


def distance(real, made):
    return frechet_distance(FeatureMoments.of(real), FeatureMoments.of(made))


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_all_nine_cases_are_there():
    assert len(CASES) == 9


@pytest.mark.parametrize("case", CASES)
def test_recorded_distances(case):
    x, y = RECORDED[f"{case}.x"], RECORDED[f"{case}.y"]
    found = distance(x, y)
    exact = RECORDED[f"{case}.oracle_unbiased_nuclear_norm"].item()
    assert found == pytest.approx(exact, rel=1e-11, abs=1e-10)
    # Matrix square roots lose up to 8e-8 where the covariance is singular.
    author = RECORDED[f"{case}.glann_fid_score"].item()
    assert found == pytest.approx(author, rel=1e-7, abs=1e-9)


def test_zero_on_itself_and_symmetric():
    for n in (300, 12):  # more and fewer than features
        x, y = normal(n, 40), normal(n, 40, seed=1) * 2
        assert distance(x, x) < 1e-11
        assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-12)


@pytest.mark.parametrize("n", [200, 5])
def test_a_shift_costs_its_square(n):
    x, shift = normal(n, 16) * 3, torch.linspace(-2, 5, 16, dtype=torch.float64)
    assert distance(x, x + shift) == pytest.approx(shift.square().sum().item(), rel=1e-11)


def test_scaling_costs_the_trace():
    # S2 = 9 S1: Tr(S1 + 9 S1 - 2 * 3 S1) = 4 Tr S1, for singular covariances too
    for n in (200, 6):
        x = normal(n, 16)
        x -= x.mean(0)
        assert distance(x, 3 * x) == pytest.approx(4 * x.var(0).sum().item(), rel=1e-11)


@pytest.mark.parametrize(("n", "d"), [(400, 24), (30, 64)])
def test_no_order_batch_or_shard_matters(n, d):
    x, y = normal(n, d) * torch.logspace(-3, 3, d, dtype=torch.float64) + 1e3, normal(n, d, seed=1) + 1e3
    expected = distance(x, y)
    real = FeatureMoments.of(y)
    for size in (1, 7, n):
        streamed = FeatureMoments(d)
        for rows in x[torch.randperm(n, generator=torch.Generator().manual_seed(size))].split(size):
            streamed.update(rows)
        assert streamed.n == n
        assert len(streamed.factor()) <= d
        assert frechet_distance(real, streamed) == pytest.approx(expected, rel=1e-10)
    shards = [FeatureMoments.of(x[rank::3]) for rank in range(3)]
    whole = FeatureMoments(d)
    for shard in (shards[2], FeatureMoments(d), shards[0], shards[1]):  # one process has seen nothing
        whole.merge(shard)
    assert frechet_distance(real, whole) == pytest.approx(expected, rel=1e-10)


def test_the_factor_holds_the_scatter():
    for n in (500, 9):
        x = normal(n, 12) @ normal(12, 12, seed=3) - 4
        factor = FeatureMoments.of(x).factor()
        expected = np.cov(x.numpy(), rowvar=False) * (n - 1)
        np.testing.assert_allclose((factor.T @ factor).numpy(), expected, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (normal(1, 4), normal(9, 4), "at least 2 real videos, got 1"),
        (normal(9, 4), normal(1, 4), "at least 2 generated videos, got 1"),
        (normal(9, 4), normal(9, 5), "real features have 4 numbers, generated ones 5"),
        (normal(9, 4), torch.ones(9, 4), "all 9 generated videos are the same"),
        (torch.full((9, 4), 0.1), normal(9, 4), "all 9 real videos are the same"),
        (normal(9, 4)[None], normal(9, 4), r"got shape \[1, 9, 4\]"),
        (normal(9, 4)[:, 0], normal(9, 4), r"got shape \[9\]"),
        (torch.zeros(9, 0), normal(9, 4), r"got shape \[9, 0\]"),
        (normal(9, 4).log(), normal(9, 4), "NaN or infinity in . of 9 rows"),
        (normal(9, 4), torch.full((9, 4), torch.inf), "NaN or infinity in 9 of 9 rows, first 0"),
    ],
)
def test_errors(real, generated, message):
    with pytest.raises(VglannError, match=message):
        distance(real, generated)


def test_rows_of_another_length_do_not_join():
    moments = FeatureMoments.of(normal(9, 4))
    with pytest.raises(VglannError, match="of 5 numbers among features of 4"):
        moments.update(normal(2, 5))
    with pytest.raises(VglannError, match="of 5 numbers among features of 4"):
        moments.merge(FeatureMoments.of(normal(2, 5)))


@pytest.mark.parametrize(
    ("real", "generated", "expected"),
    [
        (normal(50, 4), normal(50, 4, seed=1), []),
        (normal(4, 4), normal(50, 4, seed=1), ["4 videos for 4 features", "4 real and 50 generated"]),
        (normal(50, 4), normal(50, 4).flip(0), ["are identical"]),
        (normal(50, 4), normal(50, 4) * (1 + 1e-3), []),
    ],
)
def test_warnings(real, generated, expected):
    sets = FeatureMoments.of(real), FeatureMoments.of(generated)
    lines = frechet_warnings(*sets, frechet_distance(*sets))
    assert len(lines) == len(expected)
    assert all(part in line for part, line in zip(expected, lines, strict=True))
