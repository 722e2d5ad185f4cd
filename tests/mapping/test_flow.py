"""The flows: exact densities of directions, better than the Gaussian they begin as."""

import builtins
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vglann_fast.errors import VglannError
from vglann_fast.mapping.flow import AutoregressiveFlow, SplineFlow
from vglann_fast.mapping.gaussian import Gaussian
from vglann_fast.mapping.projected_normal import log_projected_normal
from vglann_fast.options.presets import PRESETS

KINDS = {"flow": SplineFlow, "autoregressive": AutoregressiveFlow}
MODERN = PRESETS["modern"].map


def small(kind, **changes):
    return replace(MODERN[kind], transforms=2, hidden=32, epochs=15, lr=5e-3, **changes)


def two_arcs(n, seed):
    """n unit rows in 4 dimensions near two arcs: no normal distribution has such directions."""
    random = torch.Generator().manual_seed(seed)
    angle = torch.rand(n, generator=random) * 2
    side = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)
    rows = torch.stack((angle.cos(), angle.sin(), side, 0 * side), 1)
    return F.normalize(rows + 0.1 * torch.randn(n, 4, generator=random), dim=1)


@pytest.fixture(scope="module", params=KINDS)
def fitted(request):
    pytest.importorskip("zuko")
    epochs = {"flow": 10, "autoregressive": 40}[request.param]  # affine steps bend latents less
    mapping, rows = KINDS[request.param](4, replace(small(request.param), epochs=epochs)), []
    mapping.fit(two_arcs(1000, 0), torch.Generator().manual_seed(0), rows.append, two_arcs(300, 1))
    return mapping, rows


def test_beats_the_gaussian_on_latents_it_has_not_seen(fitted):
    mapping, rows = fitted
    gaussian, unseen = Gaussian(4, MODERN["gaussian"]), two_arcs(300, 2)
    gaussian.fit(two_arcs(1000, 0), torch.Generator())
    assert mapping.log_density(unseen).mean() > gaussian.log_density(unseen).mean() + 0.15
    assert [row["epoch"] for row in rows] == list(range(len(mapping.epochs)))
    assert rows[-1]["held_out_loss"] < rows[0]["held_out_loss"]


def test_density_is_that_of_the_samples(fitted):
    """Integrated by samples of the Gaussian: one over the sphere, and the share of samples in each half of it."""
    mapping, _ = fitted
    gaussian = Gaussian(4, MODERN["gaussian"])
    gaussian.fit(two_arcs(1000, 0), torch.Generator())
    places = gaussian.sample(5000, torch.Generator().manual_seed(0))
    weight = (mapping.log_density(places) - gaussian.log_density(places)).exp()
    assert weight.mean().item() == pytest.approx(1, abs=0.06)
    samples = mapping.sample(5000, torch.Generator().manual_seed(0))
    assert torch.allclose(samples.norm(dim=1), torch.ones(5000))
    for axis, middle in enumerate((0.3, 0.6, 0.0, 0.0)):
        integral = (weight * (places[:, axis] > middle)).mean().item()
        assert (samples[:, axis] > middle).float().mean().item() == pytest.approx(integral, abs=0.04)


def test_samples_are_a_function_of_the_seed_also_when_loaded(fitted, tmp_path):
    mapping, rows = fitted
    mapping.save(tmp_path)
    loaded = type(mapping).load(tmp_path, torch.device("cpu"))
    assert torch.equal(*(m.sample(20, torch.Generator().manual_seed(0)) for m in (mapping, loaded)))
    assert torch.equal(*(m.log_density(two_arcs(9, 3)) for m in (mapping, loaded)))
    assert loaded.epochs == rows


@pytest.mark.parametrize("kind", KINDS)
def test_begins_as_a_normal_distribution_near_the_latents(kind):
    pytest.importorskip("zuko")
    mapping, latents = KINDS[kind](4, replace(small(kind), epochs=1, lr=1e-12)), two_arcs(1000, 0)
    mapping.fit(latents, torch.Generator().manual_seed(0))
    gaussian = Gaussian(4, MODERN["gaussian"])
    gaussian.fit(latents, torch.Generator())
    begun = mapping.log_density(latents).double()
    normal = log_projected_normal(
        latents.double(), mapping.mean[None].double(), mapping.factor[None].double()
    )
    assert torch.allclose(begun, normal[:, 0], atol=0.02)
    assert begun.mean().item() == pytest.approx(gaussian.log_density(latents).mean().item(), abs=0.5)


def test_the_best_epoch_is_kept():
    """Few latents, many steps: it overfits them, and what is kept is from before."""
    pytest.importorskip("zuko")
    options = replace(small("autoregressive"), batch_size=5, epochs=30, lr=3e-2)
    mapping, rows, unseen = AutoregressiveFlow(4, options), [], two_arcs(200, 5)
    mapping.fit(two_arcs(10, 4), torch.Generator().manual_seed(0), rows.append, unseen)
    losses = [row["held_out_loss"] for row in rows]
    assert losses[-1] > min(losses) + 0.1
    same = mapping._unseen(unseen, torch.Generator().manual_seed(0))  # the norms that `fit` drew for them
    assert mapping._loss(same).item() == pytest.approx(min(losses), rel=1e-5)


def test_fewer_latents_than_dimensions(caplog):
    pytest.importorskip("zuko")
    mapping, latents = SplineFlow(12, small("flow")), torch.randn(5, 12)
    mapping.fit(latents, torch.Generator().manual_seed(0))
    assert "no latents are held out" in caplog.text
    assert torch.isfinite(mapping.log_density(latents)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_without_zuko(kind, monkeypatch):
    real = builtins.__import__

    def absent(name, *arguments, **named):
        if name.split(".")[0] == "zuko":
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(VglannError, match=rf"--kind {kind}: pip install 'vglann-fast\[flow\]'"):
        KINDS[kind](4, small(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_one_dimension_are_refused(kind):
    with pytest.raises(VglannError, match="one dimension"):
        KINDS[kind](1, small(kind))


def test_a_diverging_fit_is_named():
    pytest.importorskip("zuko")
    mapping = SplineFlow(4, replace(small("flow"), lr=1e30))
    with pytest.raises(VglannError, match="flow: the loss is not finite in epoch"):
        mapping.fit(two_arcs(200, 0), torch.Generator().manual_seed(0))
