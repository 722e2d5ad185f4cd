"""Expectation maximization for mixtures of normal distributions with full covariances.

Dempster, Laird and Rubin, "Maximum Likelihood from Incomplete Data via the EM Algorithm", 1977. All in float64 and
on the device of the latents, in chunks that bound the memory. A prior keeps components of few latents in shape:
the inverse Wishart of Fraley and Raftery, "Bayesian Regularization for Normal Mixture Estimation and Model-Based
Clustering", 2007, as pseudo-observations: `prior` of them, with the covariance of the whole set.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from vglann_kernels import nearest_rows

from vglann_fast.errors import VglannError

NUMBERS_AT_ONCE = 1 << 24  # of a temporary tensor
LLOYD_ROUNDS = 20


@dataclass(frozen=True)
class Mixture:
    """K normal distributions in d dimensions; float64."""

    weights: Tensor  # [K], sum 1
    means: Tensor  # [K, d]
    covariances: Tensor  # [K, d, d]

    def factors(self) -> Tensor:
        """Lower triangular L [K, d, d], L L^T the covariances. Raises `VglannError` where one is singular."""
        lower, failed = torch.linalg.cholesky_ex(self.covariances)
        if failed.any():
            component = int(failed.nonzero()[0])
            raise VglannError(
                f"gmm: the covariance of component {component} is singular: it has too few different latents; "
                "raise --floor or --prior, or take fewer --components"
            )
        return lower


@dataclass(frozen=True)
class Regularization:
    """Terms added to the covariances: `floor` to the diagonal, and `prior` latents' worth of `shape` [d, d]."""

    floor: float
    prior: float
    shape: Tensor


def log_joint(latents: Tensor, mixture: Mixture) -> Tensor:
    """[N, K]: log of weight times density of every component at latents [N, d]."""
    k, d = mixture.means.shape
    factors = mixture.factors()
    log_volume = factors.diagonal(dim1=1, dim2=2).log().sum(1)  # [K]
    constant = mixture.weights.log() - log_volume - d / 2 * math.log(2 * math.pi)
    blocks = []
    for rows in latents.split(max(1, NUMBERS_AT_ONCE // (k * d))):
        offsets = rows.T - mixture.means[:, :, None]  # [K, d, n]
        white = torch.linalg.solve_triangular(factors, offsets, upper=False)
        blocks.append((constant[:, None] - 0.5 * white.square().sum(1)).T)
    return torch.cat(blocks)


def maximize(latents: Tensor, shares: Tensor, regularization: Regularization) -> Mixture:
    """The likeliest mixture, when component k has the part `shares` [N, K] of each of the latents [N, d]."""
    counts = shares.sum(0) + 10 * torch.finfo(shares.dtype).eps  # an empty component divides by no zero
    means = (shares.T @ latents) / counts[:, None]
    k, d = means.shape
    scatter = latents.new_zeros(k, d, d)
    at_once = max(1, NUMBERS_AT_ONCE // (k * d))
    for rows, parts in zip(latents.split(at_once), shares.split(at_once), strict=True):
        offsets = rows - means[:, None]  # [K, n, d]
        scatter += (parts.T[:, :, None] * offsets).mT @ offsets
    scatter += regularization.prior * regularization.shape
    covariances = scatter / (counts + regularization.prior)[:, None, None]
    covariances.diagonal(dim1=1, dim2=2).add_(regularization.floor)
    return Mixture(counts / counts.sum(), means, covariances)


def expectation_maximization(
    latents: Tensor, start: Mixture, regularization: Regularization, *, rounds: int, tolerance: float
) -> Iterator[tuple[Mixture, float]]:
    """(mixture, mean log-likelihood of the latents [N, d] under the one before it) after each round.

    Ends after `rounds`, or when that likelihood has changed by less than `tolerance`.
    """
    mixture, before = start, -math.inf
    for _ in range(rounds):
        joint = log_joint(latents, mixture)
        likelihood = torch.logsumexp(joint, 1, keepdim=True)
        mixture = maximize(latents, (joint - likelihood).exp(), regularization)
        bound = likelihood.mean().item()
        yield mixture, bound
        if abs(bound - before) < tolerance:
            return
        before = bound


def clusters(latents: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """One-hot shares [N, k] of latents [N, d]: k-means from centers far apart.

    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007, and a few rounds of Lloyd's.
    Raises `VglannError` for fewer than k different latents.
    """
    centers = _spread(latents, k, generator)
    assigned = nearest_rows(latents, centers)[0]
    for _ in range(LLOYD_ROUNDS):
        shares = torch.nn.functional.one_hot(assigned, k).to(latents.dtype)
        counts = shares.sum(0)[:, None]
        # A center that has lost its latents stays where it is.
        centers = torch.where(counts > 0, (shares.T @ latents) / counts.clamp(min=1), centers)
        assigned, before = nearest_rows(latents, centers)[0], assigned
        if torch.equal(assigned, before):
            break
    return torch.nn.functional.one_hot(assigned, k).to(latents.dtype)


def _spread(latents: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k of the rows [k, d], each drawn with a chance in proportion to its squared distance from those before it."""
    chance = latents.new_ones(len(latents))
    rows: list[Tensor] = []
    for _ in range(k):
        # On the CPU, for a GPU's cumulative sum has no fixed order.
        summed = chance.cpu().cumsum(0)
        if not summed[-1] > 0:
            raise VglannError(f"--components: {k} need as many different latents, there are {len(rows)}")
        # By the cumulative sum: torch.multinomial takes no more than 2^24 categories.
        place = torch.rand((), generator=generator, device=latents.device, dtype=latents.dtype).cpu()
        chosen = int(torch.searchsorted(summed, place * summed[-1], right=True))
        rows.append(latents[min(chosen, len(latents) - 1)])
        squared = (latents - rows[-1]).square().sum(1)
        chance = squared if len(rows) == 1 else torch.minimum(chance, squared)
    return torch.stack(rows)
