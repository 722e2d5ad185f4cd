"""The density of directions: what remains of a density of latents once their norms are divided away.

A generator divides a latent by its norm, so two samplers are the same if their samples have the same directions.
Densities are in nats above directions drawn uniformly from the sphere, so kinds can be compared: 0 says
nothing has been learned.
"""

import math

import torch
from torch import Tensor

GRID = torch.linspace(-12, 12, 161, dtype=torch.float64)  # standard deviations around the mode
NUMBERS_AT_ONCE = 1 << 24  # of a temporary tensor, which bounds the memory


def log_uniform(d: int) -> float:
    """Log density of the uniform distribution on the unit sphere in d dimensions: 1 over its area."""
    return math.lgamma(d / 2) - math.log(2) - d / 2 * math.log(math.pi)


def log_projected_normal(directions: Tensor, means: Tensor, factors: Tensor) -> Tensor:
    """Log densities of the directions of x ~ N(mean, L L^T) at unit rows.

    With y = L^-1 u and m = L^-1 mean, the density at u is the integral over r > 0 of r^(d-1) N(r u). Put s = |y| r
    and t = y.m/|y|: it is (2 pi)^(-d/2) |L|^-1 |y|^-d exp((t^2 - |m|^2)/2) times the integral of
    s^(d-1) exp(-(s-t)^2/2), which is log-concave and taken numerically around its mode. Known as the projected or
    angular normal distribution: Mardia and Jupp, "Directional Statistics", 2000, section 9.3.3.

    Args:
        directions: [n, d] unit rows, d >= 2; float64, as are the others.
        means: [K, d].
        factors: lower triangular L [K, d, d].

    Returns:
        [n, K], in nats above the uniform distribution.
    """
    at_once = max(1, NUMBERS_AT_ONCE // (len(means) * max(directions.shape[1], len(GRID))))
    return torch.cat([_log_projected_normal(rows, means, factors) for rows in directions.split(at_once)])


def _log_projected_normal(directions: Tensor, means: Tensor, factors: Tensor) -> Tensor:
    d = directions.shape[1]
    y = torch.linalg.solve_triangular(
        factors, directions.T.expand(len(means), -1, -1), upper=False
    )  # [K, d, n]
    m = torch.linalg.solve_triangular(factors, means[:, :, None], upper=False)  # [K, d, 1]
    length = y.norm(dim=1)  # [K, n]
    t = (y * m).sum(1) / length
    log_volume = factors.diagonal(dim1=1, dim2=2).log().sum(1)  # [K]
    constant = -d / 2 * math.log(2 * math.pi) - log_volume - 0.5 * m.square().sum((1, 2))
    density = constant[:, None] - d * length.log() + 0.5 * t.square() + _log_radial_integral(t, d)
    return density.T - log_uniform(d)


def _log_radial_integral(t: Tensor, d: int) -> Tensor:
    """Log of the integral over s > 0 of s^(d-1) exp(-(s-t)^2/2), elementwise."""
    root = (t.square() + 4 * (d - 1)).sqrt()
    mode = torch.where(
        t > 0, (root + t) / 2, 2 * (d - 1) / (root - t)
    )  # the same root twice, without cancellation
    width = (1 + (d - 1) / mode.square()).rsqrt()
    grid = GRID.to(t.device)
    s = mode[..., None] + width[..., None] * grid
    logs = (d - 1) * s.clamp(min=0).log() - 0.5 * (
        s - t[..., None]
    ).square()  # log 0 = -inf: no part in the sum
    return torch.logsumexp(logs, -1) + (width * (grid[1] - grid[0])).log()
