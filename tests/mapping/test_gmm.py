"""EM against recorded rounds and scikit-learn, and the mapping built on it."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_data import golden, relative_l2

from vglann_fast.errors import VglannError
from vglann_fast.mapping import em
from vglann_fast.mapping.em import (
    Mixture,
    Regularization,
    clusters,
    expectation_maximization,
    log_joint,
    maximize,
)
from vglann_fast.mapping.gmm import GMM
from vglann_fast.options.presets import PRESETS

PAPER, MODERN = PRESETS["paper"].map["gmm"], PRESETS["modern"].map["gmm"]


def no_prior(d, floor=1e-6):
    return Regularization(floor, 0.0, torch.eye(d).double())


def from_means(means):
    k, d = means.shape
    return Mixture(torch.full((k,), 1 / k).double(), means.double(), torch.eye(d).double().expand(k, d, d))


@pytest.mark.parametrize("rounds", [1, 2, 5, 50])
def test_rounds_match_the_recording(rounds):
    expected = golden("gmm_em")
    latents = expected["X"].double()
    found = list(
        expectation_maximization(
            latents, from_means(expected["means_init"]), no_prior(4), rounds=rounds, tolerance=1e-3
        )
    )
    mixture, bound = found[-1]
    assert len(found) == expected[f"it{rounds}.n_iter"].item()
    assert bound == pytest.approx(expected[f"it{rounds}.lower_bound"].item(), rel=1e-7)
    assert relative_l2(mixture.weights, expected[f"it{rounds}.weights"]) < 1e-9
    assert relative_l2(mixture.means, expected[f"it{rounds}.means"]) < 1e-9
    assert relative_l2(mixture.covariances, expected[f"it{rounds}.covariances"]) < 1e-9
    log_prob = torch.logsumexp(log_joint(latents, mixture), 1)
    assert relative_l2(log_prob, expected[f"it{rounds}.log_prob"]) < 1e-9


def blobs(n=600, d=6, k=4, seed=0):
    """n rows of k stretched blobs, float32, and the blob of each."""
    random = torch.Generator().manual_seed(seed)
    centers = 4 * torch.randn(k, d, generator=torch.Generator().manual_seed(9))
    stretch = torch.randn(k, d, d, generator=torch.Generator().manual_seed(8)) / 3
    blob = torch.arange(n) % k
    return centers[blob] + (torch.randn(n, 1, d, generator=random) @ stretch[blob])[:, 0], blob


def test_the_end_is_scikit_learns(monkeypatch):
    mixture = pytest.importorskip("sklearn.mixture")
    monkeypatch.setattr(em, "NUMBERS_AT_ONCE", 1000)  # in many chunks
    latents = blobs()[0].double()
    start = latents[:5]
    oracle = mixture.GaussianMixture(
        5, reg_covar=1e-4, tol=1e-6, max_iter=500, means_init=start.numpy(),
        weights_init=np.full(5, 0.2), precisions_init=np.stack([np.eye(6)] * 5),
    ).fit(latents.numpy())  # fmt: skip
    found = list(
        expectation_maximization(latents, from_means(start), no_prior(6, 1e-4), rounds=500, tolerance=1e-6)
    )
    assert len(found) == oracle.n_iter_
    assert np.allclose(found[-1][0].covariances, oracle.covariances_, rtol=1e-6, atol=1e-9)
    assert np.allclose(found[-1][0].means, oracle.means_, rtol=1e-6)


def test_likelihood_never_falls():
    latents = blobs(200)[0].double()
    start = maximize(latents, clusters(latents, 7, torch.Generator().manual_seed(3)), no_prior(6))
    rounds = expectation_maximization(latents, start, no_prior(6), rounds=30, tolerance=0)
    bounds = [bound for _, bound in rounds]
    assert len(bounds) == 30
    assert all(later > before - 1e-6 for before, later in pairwise(bounds))


def test_clusters_are_the_blobs():
    latents, blob = blobs()
    shares = clusters(latents.double(), 4, torch.Generator().manual_seed(0))
    assert torch.equal(shares.sum(1), torch.ones(600).double())
    together = shares.T @ F.one_hot(blob).double()
    assert (together.max(1).values == 150).all()


def test_a_component_of_few_latents_takes_the_prior_shape():
    latents = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    shares = torch.zeros(50, 2).double()
    shares[1:, 0], shares[0, 1] = 1, 1
    shape = torch.tensor([[2.0, 0.5, 0], [0.5, 1, 0], [0, 0, 3]]).double()
    mixture = maximize(latents, shares, Regularization(0.0, 9.0, shape))
    assert torch.allclose(mixture.covariances[1], shape * 9 / 10)
    assert relative_l2(mixture.covariances[0], latents[1:].T.cov(correction=0)) < 0.5


def fitted(latents, seed=0, held_out=None, **changes):
    mapping = GMM(latents.shape[1], replace(MODERN, **changes))
    mapping.fit(latents, torch.Generator().manual_seed(seed), held_out=held_out)
    return mapping


@pytest.fixture(scope="module")
def by_validation():
    latents, unseen = (F.normalize(blobs(seed=seed)[0], dim=1) for seed in (1, 2))
    return fitted(latents, components="1,4,40", held_out=unseen, prior=1.0), latents, unseen


def test_the_latents_set_aside_choose_the_size(by_validation):
    mapping, latents, unseen = by_validation
    assert len(mapping.mixture.weights) == 4
    alone = fitted(latents, components="1", held_out=unseen)
    assert mapping.log_density(unseen).mean() > alone.log_density(unseen).mean() + 0.5
    last = mapping.epochs[-1]
    assert last["held_out_loss"] == pytest.approx(-mapping.log_density(unseen).mean().item())
    assert [row["epoch"] for row in mapping.epochs] == list(range(len(mapping.epochs)))


def test_samples_come_shuffled_and_in_the_right_shares(by_validation):
    mapping, *_ = by_validation
    samples = mapping.sample(4000, torch.Generator().manual_seed(0))
    assert torch.allclose(samples.norm(dim=1), torch.ones(4000))
    blob = torch.cdist(samples, F.normalize(mapping.mixture.means, dim=1).float()).argmin(1)
    assert torch.allclose(torch.bincount(blob, minlength=4) / 4000, torch.full((4,), 0.25), atol=0.04)
    same = (blob[1:] == blob[:-1]).float().mean().item()  # 1 if sorted
    assert same == pytest.approx(0.25, abs=0.04)
    assert torch.equal(samples, mapping.sample(4000, torch.Generator().manual_seed(0)))


def test_save_and_load(by_validation, tmp_path):
    mapping, latents, _ = by_validation
    mapping.save(tmp_path)
    loaded = GMM.load(tmp_path, torch.device("cpu"))
    assert torch.equal(loaded.log_density(latents), mapping.log_density(latents))
    assert torch.equal(*(m.sample(9, torch.Generator().manual_seed(0)) for m in (mapping, loaded)))
    assert loaded.options == mapping.options


def test_paper_warns_of_flat_components(caplog):
    latents = F.normalize(torch.randn(40, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    mapping = GMM(12, replace(PAPER, components="5", starts=1))
    mapping.fit(latents, torch.Generator().manual_seed(0))
    assert "of 5 components have no more latents than the 12 dimensions" in caplog.text
    assert torch.isfinite(mapping.log_density(latents)).all()


def test_one_dimension_has_no_density_of_directions():
    latents = torch.tensor([[1.0], [-1], [1], [1]])
    mapping = fitted(latents, held_out=latents[:2], components="1")
    assert mapping.log_density(latents) is None
    assert "held_out_loss" not in mapping.epochs[-1]
    with pytest.raises(VglannError, match="--components: expected one number for latents of one dimension"):
        fitted(latents, held_out=latents[:2], components="1,2")


def test_bad_sets():
    latents = blobs(10)[0]
    with pytest.raises(VglannError, match="--components 11: more than there are latents, 10"):
        fitted(latents, components="11")
    with pytest.raises(VglannError, match="3 need as many different latents, there are 2"):
        fitted(latents[:2].repeat(3, 1), components="3")
    with pytest.raises(VglannError, match=r"covariance of component . is singular.*raise --floor"):
        fitted(latents, components="4", floor=0.0, prior=0.0)
    with pytest.raises(VglannError, match="raise --holdout-fraction"):
        fitted(latents, components="1,2")
    with pytest.raises(VglannError, match="NaN"):
        fitted(latents.index_fill(0, torch.tensor([3]), torch.nan))


@pytest.mark.parametrize("value", ["", "0", "two", "1,,2", "-3", "1.5"])
def test_bad_components(value):
    with pytest.raises(VglannError, match="--components: expected a number"):
        replace(MODERN, components=value)
    with pytest.raises(VglannError, match="one number with --holdout-fraction 0"):
        replace(MODERN, components="1,2", holdout_fraction=0.0)
