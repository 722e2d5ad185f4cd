"""The matching of IMLE and its options: RS-IMLE's rejection, adaptive re-matching, several processes."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from fitted_imle import fitted
from forked_process import ranks
from golden_data import golden

from vglann_fast.errors import VglannError
from vglann_fast.mapping.match import match, match_kept, rejected
from vglann_fast.mapping.regression import Regression
from vglann_fast.options.mapping import ImleOptions


@pytest.mark.parametrize("epsilon", ["0.65", "0.75", "0.85"])
def test_recorded_rejections(epsilon):
    expected = golden("rs_match")
    data, pool = expected["data"], expected["pool"]
    out = rejected(data, pool, torch.tensor(float(epsilon)))
    assert torch.equal(out, expected[f"eps{epsilon}.full.rejected"])
    index, distance = match_kept(data, pool, ~out)
    assert torch.equal(index, expected[f"eps{epsilon}.full.index"])
    torch.testing.assert_close(distance.double(), expected[f"eps{epsilon}.full.dist"], rtol=1e-6, atol=0)


def test_plain_matching():
    expected = golden("rs_match")
    index, distance = match(expected["data"], expected["pool"])
    assert torch.equal(index, expected["plain.index"])
    torch.testing.assert_close(distance.double(), expected["plain.dist"], rtol=1e-6, atol=0)


def test_the_quantile_sets_epsilon():
    expected = golden("rs_match")
    data, pool = expected["data"], expected["pool"]
    every = torch.cdist(data.double(), pool.double())
    epsilon = expected["plain.dist"].sort().values[100]
    left = every.amin(dim=0) >= epsilon - 1e-7
    index, distance = match(data, pool, reject_quantile=0.5)
    best = every.where(left, torch.inf).min(dim=1)
    assert torch.equal(index, best.indices)
    torch.testing.assert_close(distance.double(), best.values, rtol=1e-6, atol=0)
    assert (distance.double() >= epsilon - 1e-6).all()
    assert all(map(torch.equal, match(data, pool, reject_quantile=0.001), match(data, pool)))


def test_a_rejection_that_leaves_nothing():
    data = torch.tensor([[0.0], [10.0]])
    pool = torch.tensor([[0.1], [0.2]])
    with pytest.raises(VglannError, match="--reject-quantile: all 2 noise vectors"):
        match(data, pool, reject_quantile=0.9)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_bad_options(value):
    with pytest.raises(VglannError, match="--reject-quantile: expected 0 to below 1"):
        ImleOptions(reject_quantile=value)
    with pytest.raises(VglannError, match="--rematch: expected above 0 to 1"):
        ImleOptions(rematch=value * 2)


def test_rejection_keeps_distance_while_fitting():
    plain, rejecting = fitted()[1], fitted(reject_quantile=0.3)[1]
    assert rejecting[0]["match_distance"] > plain[0]["match_distance"]
    assert all(0 < row["match_diversity"] <= 1 for row in rejecting)


def test_adaptive_rematching_matches_only_what_came_near():
    rows = fitted(rematch=0.7)[1]
    shares = [row["rematched"] for row in rows]
    assert shares[0] == 1
    assert all(share < 1 for share in shares[1:])
    assert any(share > 0 for share in shares[1:])
    assert "rematched" not in fitted()[1][0]


def test_a_kept_match_is_looked_at_without_training():
    """With a share that nothing reaches, every epoch regresses from the first epoch's noise."""
    mapping, rows = fitted(rematch=1e-6)
    assert [row["rematched"] for row in rows] == [1, 0, 0, 0, 0, 0]
    assert len({row["match_distance"] for row in rows}) == 1
    assert rows[-1]["loss"] < rows[0]["loss"]
    # 10 batches an epoch, and the 100 blocks of the pool that was mapped once
    assert mapping.network.norm1.num_batches_tracked == 6 * 10 + 100


def test_a_regression_restarts_and_forgets():
    """As a capture needs: after `nothing_happened` and `restart` the steps equal the steps of a new optimizer."""
    latents, noise = torch.randn(40, 3), torch.randn(40, 5)
    order = torch.randperm(40)
    results = []
    for disturbed in (False, True):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
        regression = Regression(network, network, 1e-2, 1e-5)
        if disturbed:
            with regression.nothing_happened():
                regression.run(noise, latents, order, 10)
            with regression.nothing_happened():
                regression.run(noise, latents, order, 8)
        first = regression.run(noise, latents, order, 10)
        regression.restart()
        regression.set_rate(1e-3)
        second = regression.run(noise, latents, order, 12)  # 4 left out
        results.append([first, second, *network.state_dict().values()])
    assert all(map(torch.equal, *results))


def test_replayed_steps_are_the_steps(monkeypatch):
    """The path of a GPU with a graph that only calls the step again: nothing is left of warm-up and capture."""
    latents, noise = torch.randn(40, 3), torch.randn(40, 5)
    results = []
    for on_gpu in (False, True):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
        regression = Regression(network, network, 1e-2, 1e-5)
        if on_gpu:
            regression._on_gpu = True
            captures = []

            def replay(regression=regression):
                regression._step(regression._graph[2])

            graph = SimpleNamespace(replay=replay)
            stream = SimpleNamespace(wait_stream=lambda other: None)
            for name, value in {
                "CUDAGraph": lambda graph=graph: graph,
                "Stream": lambda stream=stream: stream,
                "current_stream": lambda stream=stream: stream,
                "stream": nullcontext,
                "graph": lambda graph, captures=captures: captures.append(graph) or nullcontext(),
            }.items():
                monkeypatch.setattr(torch.cuda, name, value)
        losses = [regression.run(noise, latents, torch.randperm(40), 10) for _ in range(3)]
        losses.append(regression.run(noise + 1, latents, torch.randperm(40), 10))
        losses.append(regression.run(noise[:20], latents[:20], torch.randperm(20), 10))
        results.append([*losses, *network.state_dict().values()])
    assert len(captures) == 2  # one a shape
    assert all(map(torch.equal, *results))


TWO_PROCESSES = """
import torch, torch.distributed as dist
from vglann_kernels import nearest_rows
from vglann_kernels.nearest.sharded import nearest_rows_sharded
from nearest_data import hard_case
from fitted_imle import fitted

def answers():
    found = []
    for case in ("planted ties", "integers", "tight clusters", "one row"):
        queries, database = hard_case(case, n=20, m=300)
        half = (len(database) + 1) // 2  # the second process may have no row
        parts = database[:half], database[half:]
        if dist.is_initialized():
            rank = dist.get_rank()
            found += nearest_rows_sharded(queries, parts[rank], rank * half)
        else:
            found += nearest_rows(queries, database)
    mapping, rows = fitted(reject_quantile=0.2, rematch=0.9)
    return found + list(mapping.network.state_dict().values()), rows

alone = answers()
dist.init_process_group("gloo")
together = answers()

@torch.no_grad()
def drift(mapping):
    if dist.get_rank() == 1:
        for tensor in mapping.network.state_dict().values():
            tensor.add_(1)
        for state in mapping._regression.optimizer.state.values():
            state["exp_avg"].add_(1)
        mapping._matched.distance.mul_(1.5)

parted = fitted(drift, reject_quantile=0.2, rematch=0.9)[1]
first = dist.get_rank() == 0
dist.destroy_process_group()
assert all(map(torch.equal, alone[0], together[0]))
assert alone[1] == together[1]
# Every epoch begins with the network of the first process, which also says what is matched again; Adam's moments of
# the others reach nothing.
assert not first or alone[1] == parted
"""


def test_two_processes_find_what_one_finds(tmp_path):
    started = ranks(TWO_PROCESSES, folder=tmp_path)
    assert [process.wait(120) for process in started] == [0, 0], [process.said() for process in started]
