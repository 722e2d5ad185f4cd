"""The Gaussian mapping, and densities of directions."""

import math

import pytest
import torch
import torch.nn.functional as F
from golden_data import golden, relative_l2

from vglann_fast.mapping.gaussian import Gaussian
from vglann_fast.mapping.projected_normal import log_projected_normal
from vglann_fast.options.presets import PRESETS


def fitted(latents):
    mapping = Gaussian(latents.shape[1], PRESETS["paper"].map["gaussian"])
    mapping.fit(latents, torch.Generator())
    return mapping


def test_sampler_matches_the_author():
    expected = golden("sample_gaussian")
    mapping = fitted(expected["W"])
    assert relative_l2(mapping.mean, expected["mean"]) < 1e-6
    assert relative_l2(mapping.factor.T @ mapping.factor, expected["cov"]) < 1e-6
    axes = expected["svd_s"].sqrt()[:, None] * expected["svd_vt"]
    signs = (mapping.factor * axes).sum(1).sign()  # signs of singular vectors are arbitrary
    samples = mapping.from_noise(expected["standard_normals"] * signs)
    assert relative_l2(samples, expected["samples"]) < 1e-6


def test_samples_have_the_directions_of_the_latents():
    random = torch.Generator().manual_seed(0)
    latents = F.normalize(torch.tensor([1.0, 0, 0, 0]) + 0.3 * torch.randn(4000, 4, generator=random), dim=1)
    samples = fitted(latents).sample(4000, torch.Generator().manual_seed(1))
    assert torch.allclose(samples.mean(0), latents.mean(0), atol=0.02)
    assert torch.allclose(samples.T.cov(), latents.T.cov(), atol=0.01)


def test_a_singular_covariance_warns_and_has_no_likelihood(caplog):
    latents = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    mapping = fitted(latents)
    assert "5 latents in 8 dimensions is singular" in caplog.text
    assert mapping.log_density(latents) is None
    assert mapping.epochs == [{"epoch": 0}]
    samples = mapping.sample(6, torch.Generator().manual_seed(0)).double()
    stacked = torch.cat([latents.double(), samples])
    assert torch.linalg.matrix_rank(stacked, atol=1e-5) == torch.linalg.matrix_rank(latents.double())


def test_one_dimension_has_no_density_of_directions(caplog):
    latents = torch.tensor([[1.0], [-1], [1], [1]])
    mapping = fitted(latents)
    assert mapping.log_density(latents) is None
    assert mapping.epochs == [{"epoch": 0}]
    assert not caplog.text


def test_save_and_load(tmp_path):
    mapping = fitted(golden("sample_gaussian")["W"])
    mapping.save(tmp_path)
    loaded = Gaussian.load(tmp_path, torch.device("cpu"))
    assert torch.equal(*(m.sample(9, torch.Generator().manual_seed(0)) for m in (mapping, loaded)))


@pytest.mark.parametrize("mean", [[0.0, 0.0], [0.4, 0.1], [30.0, -2.0], [0.01, 0.0]])
def test_density_on_the_circle_is_that_of_samples(mean):
    """Over the circle it integrates to one, and to the shares of samples in each quarter."""
    factor = torch.tensor([[[1.0, 0.0], [0.7, 0.3]]], dtype=torch.float64)
    means = torch.tensor([mean], dtype=torch.float64)
    angles = (torch.arange(4096, dtype=torch.float64) + 0.5) * (2 * math.pi / 4096)
    directions = torch.stack((angles.cos(), angles.sin()), 1)
    density = log_projected_normal(directions, means, factor)[:, 0].exp() / 4096
    assert density.sum().item() == pytest.approx(1, abs=2e-3)
    noise = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = means + noise @ factor[0].T
    quarter = (torch.atan2(x[:, 1], x[:, 0]) % (2 * math.pi) / (math.pi / 2)).long()
    shares = torch.bincount(quarter, minlength=4) / len(x)
    assert torch.allclose(density.view(4, -1).sum(1), shares.double(), atol=5e-3)


@pytest.mark.parametrize("d", [3, 100])
def test_the_standard_normal_has_uniform_directions(d):
    directions = F.normalize(torch.randn(7, d, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    means, factors = torch.zeros(1, d).double(), 3 * torch.eye(d).double()[None]
    density = log_projected_normal(directions, means, factors)
    assert torch.allclose(density, torch.zeros(7, 1).double(), atol=1e-4)


def test_density_in_high_dimensions_is_a_ratio_of_solid_angles():
    """N(0, diag) has a closed form: log-density -sum(log s) - d/2 log(sum u^2/s^2), relative to uniform."""
    random = torch.Generator().manual_seed(0)
    scale = torch.rand(60, generator=random).double() + 0.1
    u = F.normalize(torch.randn(20, 60, generator=random).double() * scale, dim=1)
    found = log_projected_normal(u, torch.zeros(1, 60).double(), scale.diag()[None])[:, 0]
    expected = -scale.log().sum() - 30 * (u / scale).square().sum(1).log()
    assert torch.allclose(found, expected, rtol=1e-6)
