"""Drifting: the drift against its definition, and what a fit reaches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vglann_fast.errors import VglannError
from vglann_fast.mapping.drifting import Drifting, drift, median_nearest_distance
from vglann_fast.options.presets import PRESETS


def groups(seed, sizes=(20, 20, 20)):
    """Tight groups on the unit sphere in 8 dimensions, and their centers."""
    centers = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    rows = centers.repeat_interleave(torch.tensor(sizes), 0)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows + 0.02 * noise, dim=1), centers


def random_rows(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_drift_is_its_double_sum():
    samples, latents = random_rows(5, 3, 0), random_rows(7, 3, 1)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for temperature in (0.5, 2.0):
        near = torch.tensor([[(-(x - y).norm() / temperature).exp() for y in latents] for x in samples])
        away = torch.tensor([[(-(x - y).norm() / temperature).exp() for y in samples] for x in samples])
        away.fill_diagonal_(0)
        both = torch.cat([near, away], 1)
        affinity = both / (both.sum(1, keepdim=True) * both.sum(0, keepdim=True)).sqrt()
        for i in range(5):
            for j in range(7):
                for k in range(5):
                    expected[i] += affinity[i, j] * affinity[i, 7 + k] * (latents[j] - samples[k])
    torch.testing.assert_close(
        drift(samples, latents, (0.5, 2.0)), expected.to(torch.float64), atol=1e-6, rtol=1e-5
    )


def test_samples_of_the_same_distribution_do_not_drift_on_average():
    """A shifted set drifts back."""
    latents, samples = random_rows(400, 2, 0), random_rows(400, 2, 1)
    still, shifted = drift(samples, latents, [0.5]).mean(0), drift(samples + 1, latents, [0.5]).mean(0)
    assert shifted.max() < 0
    assert still.norm() < 0.2 * shifted.norm()


def test_the_scale_is_the_median_distance_to_another_latent():
    rows = torch.tensor([[0.0], [0.0], [1.0], [3.0], [6.0]])
    assert median_nearest_distance(rows) == 1.0
    assert median_nearest_distance(torch.ones(3, 2)) == 0.0


@pytest.mark.parametrize("n", [4096, 4098, 9000])
def test_the_scale_does_not_jump_where_only_some_rows_are_measured(n):
    """Rows are in pairs, as clips of one shot are: every second row leaves out the nearest of each."""
    rows = torch.arange(n, dtype=torch.float64)[:, None] // 2
    rows[1::2] += 0.01
    assert median_nearest_distance(rows) == pytest.approx(0.01)


@pytest.fixture(scope="module")
def fitted():
    options = replace(
        PRESETS["modern"].map["drifting"], noise_dim=4, hidden=32, batch_size=60, lr=5e-3, epochs=400
    )
    mapping, rows = Drifting(8, replace(options, temperatures="2,8")), []
    mapping.fit(groups(1, sizes=(30, 20, 10))[0], torch.Generator().manual_seed(1), rows.append)
    return mapping, rows


def test_fit_covers_every_group_by_its_share(fitted):
    mapping, rows = fitted
    samples = mapping.sample(600, torch.Generator().manual_seed(2))
    assert torch.allclose(samples.norm(dim=1), torch.ones(600))
    nearest = torch.cdist(samples, groups(1)[1]).argmin(1).bincount(minlength=3) / 600
    assert (nearest - torch.tensor([0.5, 0.333, 0.167])).abs().max() < 0.12
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["epoch"] for row in rows] == list(range(400))


def test_samples_are_a_function_of_the_seed_also_when_loaded(fitted, tmp_path):
    mapping, rows = fitted
    mapping.save(tmp_path)
    loaded = Drifting.load(tmp_path, torch.device("cpu"))
    first, again, other = (
        m.sample(10, torch.Generator().manual_seed(seed))
        for m, seed in ((mapping, 3), (loaded, 3), (mapping, 4))
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert loaded.epochs == rows


def test_the_same_seed_fits_the_same():
    options = replace(PRESETS["modern"].map["drifting"], noise_dim=2, hidden=4, epochs=3)
    samples = []
    for _ in range(2):
        mapping = Drifting(8, options, seed=3)
        mapping.fit(groups(1)[0], torch.Generator().manual_seed(3))
        samples.append(mapping.sample(4, torch.Generator().manual_seed(0)))
    assert torch.equal(*samples)


@pytest.mark.parametrize("n", [2, 9])
def test_latents_that_are_all_equal_are_sampled(n):
    mapping = Drifting(3, replace(PRESETS["modern"].map["drifting"], hidden=4, epochs=3))
    mapping.fit(torch.ones(n, 3), torch.Generator())
    assert mapping.sample(5, torch.Generator()).isfinite().all()


def test_a_diverging_fit_is_named():
    mapping = Drifting(8, replace(PRESETS["modern"].map["drifting"], lr=1e37, epochs=9))
    with pytest.raises(VglannError, match=r"not finite in epoch \d; lower --lr"):
        mapping.fit(groups(1)[0], torch.Generator())
