"""Adam over a table of latents of which a step touches a few rows, in plain PyTorch: the choice of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .rule import Betas, retracted, with_gradient, without_gradient
from .state import LatentAdamState


def gather(
    latents: Tensor, state: LatentAdamState, index: Tensor, lr: Tensor | None, betas: Betas, eps: float
) -> Tensor:
    """Return the rows [B,d], in lazy mode brought up to the current step. Writes nothing."""
    z = latents[index]
    if state.mode != "lazy" or lr is None:
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
    """Take one step in place; see `vglann_kernels.latent_adam_step`. `skip` is a bool []: true changes nothing."""
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
        state.step += ~skip if state.mode == "lazy" else 0
        return
    # Duplicates are summed into the first of them; all of them then write the same row.
    first = (index[:, None] == index[None, :]).int().argmax(dim=1)  # [B]
    g = torch.zeros_like(grad).index_add_(0, first, grad)[first]
    old_rows = (latents[index], m[index], v[index])
    start = state.row_step[index]
    if state.mode == "lazy":
        t = (state.step + 1).expand_as(start)
        rows = without_gradient(*old_rows, start, state.step, lr, betas, eps)
    else:
        t, rows = start + 1, old_rows
    z, m_new, v_new = with_gradient(*rows, g, t[:, None], lr, betas, eps)
    new_rows = (retracted(z, retraction), m_new, v_new)
    for table, old, value in zip((latents, m, v), old_rows, new_rows, strict=True):
        table[index] = torch.where(skip, old, value)
    state.row_step[index] = torch.where(skip, start, t)
    if state.mode == "lazy":
        state.step += ~skip


def flush(latents: Tensor, state: LatentAdamState, lr: Tensor, betas: Betas, eps: float) -> None:
    """Bring every row up to the current step, in place."""
    rows = (latents, state.exp_avg, state.exp_avg_sq)
    new = without_gradient(*rows, state.row_step, state.step, lr, betas, eps)
    for table, value in zip(rows, new, strict=True):
        table.copy_(value)
    state.row_step.copy_(state.step.expand_as(state.row_step))
