"""Flow matching: the rules by which samples follow the flow, and what a fit reaches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vglann_fast.errors import VglannError
from vglann_fast.mapping.flow_matching import FlowMatching
from vglann_fast.options.presets import PRESETS

MODERN = PRESETS["modern"].map["flow-matching"]


def groups(seed, sizes=(20, 20, 20)):
    """Tight groups on the unit sphere in 8 dimensions, and their centers."""
    centers = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    rows = centers.repeat_interleave(torch.tensor(sizes), 0)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows + 0.02 * noise, dim=1), centers


@pytest.mark.parametrize(
    ("solver", "factor"), [("euler", lambda h: 1 - h), ("heun", lambda h: 1 - h + h * h / 2)]
)
def test_each_rule_follows_a_known_field_by_its_own_formula(solver, factor, monkeypatch):
    """Along dx/dt = -x a step multiplies x by a known number."""
    for steps in (1, 5):
        mapping = FlowMatching(3, replace(MODERN, hidden=4, solver=solver, steps=steps), dtype=torch.float64)
        monkeypatch.setattr(mapping, "velocity", lambda x, t: -x)
        start = torch.randn(4, 3, dtype=torch.float64)
        torch.testing.assert_close(mapping.follow(start), start * factor(1 / steps) ** steps)


@pytest.mark.parametrize(("solver", "expected"), [("euler", 0.4), ("heun", 0.5)])
def test_time_goes_from_0_to_1(solver, expected, monkeypatch):
    """The integral of t over [0, 1] in five steps: from the left by Euler's rule, exact by Heun's."""
    mapping = FlowMatching(3, replace(MODERN, hidden=4, solver=solver, steps=5), dtype=torch.float64)
    monkeypatch.setattr(mapping, "velocity", lambda x, t: t.expand_as(x))
    found = mapping.follow(torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(found, torch.full_like(found, expected))


@pytest.fixture(scope="module")
def fitted():
    options = replace(MODERN, hidden=64, batch_size=60, lr=5e-3, epochs=500)
    mapping, rows = FlowMatching(8, options), []
    fit_to, unseen = (groups(seed, sizes=(30, 20, 10))[0] for seed in (1, 2))
    mapping.fit(fit_to, torch.Generator().manual_seed(1), rows.append, unseen)
    return mapping, rows


def test_fit_covers_every_group_by_its_share(fitted):
    mapping, rows = fitted
    samples = mapping.sample(600, torch.Generator().manual_seed(2))
    assert torch.allclose(samples.norm(dim=1), torch.ones(600))
    distance, nearest = torch.cdist(samples, groups(1)[1]).min(1)
    shares = nearest.bincount(minlength=3) / 600
    assert (shares - torch.tensor([0.5, 0.333, 0.167])).abs().max() < 0.12
    assert distance.median() < 0.3
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["held_out_loss"] < rows[0]["held_out_loss"]
    assert [row["epoch"] for row in rows] == list(range(500))


def test_samples_are_a_function_of_the_seed_also_when_loaded(fitted, tmp_path):
    mapping, rows = fitted
    mapping.save(tmp_path)
    loaded = FlowMatching.load(tmp_path, torch.device("cpu"))
    first, again, other = (
        m.sample(10, torch.Generator().manual_seed(seed))
        for m, seed in ((mapping, 3), (loaded, 3), (mapping, 4))
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert loaded.epochs == rows


def test_the_same_seed_fits_the_same():
    samples = []
    for _ in range(2):
        mapping = FlowMatching(8, replace(MODERN, hidden=4, epochs=3), seed=3)
        mapping.fit(groups(1)[0], torch.Generator().manual_seed(3))
        samples.append(mapping.sample(4, torch.Generator().manual_seed(0)))
    assert torch.equal(*samples)


def test_latents_of_one_number_are_sampled():
    mapping = FlowMatching(1, replace(MODERN, hidden=4, epochs=2))
    mapping.fit(torch.tensor([[1.0], [-1.0]]), torch.Generator())
    assert mapping.sample(5, torch.Generator()).abs().eq(1).all()


def test_a_diverging_fit_is_named():
    mapping = FlowMatching(8, replace(MODERN, hidden=8, lr=1e30, epochs=9))
    with pytest.raises(VglannError, match=r"not finite in epoch \d; lower --lr"):
        mapping.fit(groups(1)[0], torch.Generator())
