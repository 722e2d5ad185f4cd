"""Adam's rule (Kingma and Ba 2015) for rows of a table, with a gradient and for steps without one.

All functions work on tensors of one dtype, float32 or float64; scalars that lose digits in float32 (1 -
beta^t) are computed in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Betas = tuple[float, float]


def series_terms(betas: Betas, dtype: torch.dtype) -> int:
    """Return the number of skipped updates of a row that matter.

    The s-th is about (beta1 / sqrt(beta2))^s of the first. The rest of the series is under 2^-30 of it (2^-60
    in float64).
    """
    if betas[0] == 0:
        return 0
    ratio = betas[0] / math.sqrt(betas[1])
    bits = 60 if dtype == torch.float64 else 30
    return math.ceil((-bits * math.log(2) + math.log1p(-ratio)) / math.log(ratio))


def bias_correction(beta: float, steps: Tensor) -> Tensor:
    """Return 1 - beta^t in float64."""
    return -torch.expm1(steps.double() * math.log(beta)) if beta > 0 else torch.ones_like(steps).double()


def without_gradient(
    z: Tensor, m: Tensor, v: Tensor, start: Tensor, end: Tensor, lr: Tensor, betas: Betas, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows [R,d] after Adam's steps start+1 .. end ([R] or [], int64) with a gradient of zero.

    Step start + s moves z by -lr * beta1^s m / (1 - beta1^t) / (sqrt(beta2^s v / (1 - beta2^t)) + eps).
    """
    skipped = (end - start)[:, None]  # [R,1]
    root = v.sqrt()
    for s in range(1, series_terms(betas, z.dtype) + 1):
        t = start[:, None] + s
        scale = lr.double() * betas[0] ** s / bias_correction(betas[0], t)  # [R,1]
        shrink = betas[1] ** (s / 2) / bias_correction(betas[1], t).sqrt()
        move = scale.to(z.dtype) * m / (shrink.to(z.dtype) * root + eps)
        z = torch.where(s <= skipped, z - move, z)
    return z, m * (betas[0] ** skipped.double()).to(z.dtype), v * (betas[1] ** skipped.double()).to(z.dtype)


def with_gradient(
    z: Tensor, m: Tensor, v: Tensor, g: Tensor, t: Tensor, lr: Tensor, betas: Betas, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Take Adam's step number t ([R,1] or []) of rows [R,d] with gradient g; returns z, m and v."""
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    scale = (lr.double() / bias_correction(betas[0], t)).to(z.dtype)
    root = bias_correction(betas[1], t).sqrt().to(z.dtype)
    return z - scale * m / (v.sqrt() / root + eps), m, v


def retracted(z: Tensor, retraction: str | None) -> Tensor:
    """Divide rows by their norm ("sphere"), or by their norm where it is above 1 ("ball"); None changes nothing."""
    if retraction is None:
        return z
    norm = z.norm(dim=1, keepdim=True)
    # A zero row stays zero.
    smallest = 1.0 if retraction == "ball" else torch.finfo(z.dtype).tiny
    return z / norm.clamp_min(smallest)
