"""`guard_step` in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def guard_step(
    loss: Tensor, own: Tensor, index: Tensor, overflow: Tensor | None, frozen: Tensor, mine: Tensor,
    step: Tensor, rows: Tensor, skip: Tensor, found_inf: Tensor, words: Tensor | None, kept: Tensor | None,
) -> None:  # fmt: skip
    """Decide in place whether a step counts; see `vglann_kernels.guard_step`."""
    first = ~frozen & ~torch.isfinite(loss)
    torch.where(first, index, rows, out=rows)
    mine |= first & ~torch.isfinite(own)
    frozen |= first
    step += ~frozen
    skip.copy_(frozen if overflow is None else frozen | overflow)
    found_inf.copy_(skip)
    if words is not None and kept is not None:
        torch.where(frozen, kept, words, out=kept)
        words.copy_(kept)
