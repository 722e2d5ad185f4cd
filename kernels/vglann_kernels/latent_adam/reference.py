"""Adam (Kingma and Ba 2015) over a table of latents of which a step touches a few rows, in plain PyTorch.

All functions work on tensors of one dtype, float32 or float64; scalars that lose digits in float32 (1 -
beta^t) are computed in float64.
"""

import math

import torch
from torch import Tensor

from .state import LatentAdamState

Betas = tuple[float, float]


def series_terms(betas: Betas, dtype: torch.dtype) -> int:
    """How many skipped updates of a row matter: the s-th is about (beta1 / sqrt(beta2))^s of the first.

    The rest of the series is under 2^-30 of it (2^-60 in float64).
    """
    if betas[0] == 0:
        return 0
    ratio = betas[0] / math.sqrt(betas[1])
    bits = 60 if dtype == torch.float64 else 30
    return math.ceil((-bits * math.log(2) + math.log1p(-ratio)) / math.log(ratio))


def bias_correction(beta: float, steps: Tensor) -> Tensor:
    """1 - beta^t in float64."""
    return -torch.expm1(steps.double() * math.log(beta)) if beta > 0 else torch.ones_like(steps).double()


def without_gradient(
    z: Tensor, m: Tensor, v: Tensor, start: Tensor, end: Tensor, lr: Tensor, betas: Betas, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [R,d] after Adam's steps start+1 .. end ([R] or [], int64) with a gradient of zero.

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
    """One Adam step number t ([R,1] or []) of rows [R,d] with gradient g."""
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    scale = (lr.double() / bias_correction(betas[0], t)).to(z.dtype)
    root = bias_correction(betas[1], t).sqrt().to(z.dtype)
    return z - scale * m / (v.sqrt() / root + eps), m, v


def retracted(z: Tensor, retraction: str | None) -> Tensor:
    """Rows divided by their norm ("sphere"), by their norm where it is above 1 ("ball"), or as they are."""
    if retraction is None:
        return z
    norm = z.norm(dim=1, keepdim=True)
    smallest = 1.0 if retraction == "ball" else torch.finfo(z.dtype).tiny  # a zero row stays zero
    return z / norm.clamp_min(smallest)


def gather(
    latents: Tensor, state: LatentAdamState, index: Tensor, lr: Tensor | None, betas: Betas, eps: float
) -> Tensor:
    """[B,d]: the rows, in catchup mode brought up to the current step. Writes nothing."""
    z = latents[index]
    if state.mode != "catchup" or lr is None:
        return z
    m, v, start = state.exp_avg[index], state.exp_avg_sq[index], state.row_step[index]
    return without_gradient(z, m, v, start, state.step, lr, betas, eps)[0]


def step(
    latents: Tensor,
    state: LatentAdamState,
    index: Tensor,
    grad: Tensor,
    lr: Tensor,
    betas: Betas,
    eps: float,
    retraction: str | None,
    skip: Tensor,
) -> None:
    """One step in place; see `vglann_kernels.latent_adam_step`. `skip` is a bool []: true changes nothing."""
    grad = grad.to(latents.dtype)
    m, v = state.exp_avg, state.exp_avg_sq
    if state.mode == "dense":
        g = torch.zeros_like(latents).index_add_(0, index, grad)
        new = with_gradient(latents, m, v, g, state.step + 1, lr, betas, eps)
        for old, value in zip((latents, m, v), new, strict=True):
            old.copy_(torch.where(skip, old, value))
        state.step += ~skip
        return
    if len(index) == 0:
        state.step += ~skip if state.mode == "catchup" else 0
        return
    # Duplicates are summed into the first of them; all of them then write the same row.
    first = (index[:, None] == index[None, :]).int().argmax(dim=1)  # [B]
    g = torch.zeros_like(grad).index_add_(0, first, grad)[first]
    old_rows = (latents[index], m[index], v[index])
    start = state.row_step[index]
    if state.mode == "catchup":
        t = (state.step + 1).expand_as(start)
        rows = without_gradient(*old_rows, start, state.step, lr, betas, eps)
    else:
        t, rows = start + 1, old_rows
    z, m_new, v_new = with_gradient(*rows, g, t[:, None], lr, betas, eps)
    new_rows = (retracted(z, retraction), m_new, v_new)
    for table, old, value in zip((latents, m, v), old_rows, new_rows, strict=True):
        table[index] = torch.where(skip, old, value)
    state.row_step[index] = torch.where(skip, start, t)
    if state.mode == "catchup":
        state.step += ~skip


def flush(latents: Tensor, state: LatentAdamState, lr: Tensor, betas: Betas, eps: float) -> None:
    """Bring every row up to the current step, in place."""
    rows = (latents, state.exp_avg, state.exp_avg_sq)
    new = without_gradient(*rows, state.row_step, state.step, lr, betas, eps)
    for table, value in zip(rows, new, strict=True):
        table.copy_(value)
    state.row_step.copy_(state.step.expand_as(state.row_step))
