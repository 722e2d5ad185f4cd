"""`guard_step` in Triton: one program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import LAUNCH, device_guard

# Values at a time: the statistics of a generator of width 64 are 3,856 words.
BLOCK, WARPS = 4096, 16


@triton.jit
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def _guard_kernel(
    loss_ptr, own_ptr, index_ptr, overflow_ptr, frozen_ptr, mine_ptr, step_ptr, rows_ptr, skip_ptr,
    found_inf_ptr, words_ptr, kept_ptr, batch, count, BLOCK: tl.constexpr,
):  # fmt: skip
    # Any float: loss [], own []. int64: index, rows [batch]; step []. float32: found_inf [].
    # int32: words, kept [count]. bool: overflow [], frozen [], mine [], skip [].
    was_frozen = tl.load(frozen_ptr) != 0
    first = (was_frozen == 0) & (is_finite(tl.load(loss_ptr)) == 0)
    mine = (tl.load(mine_ptr) != 0) | (first & (is_finite(tl.load(own_ptr)) == 0))
    frozen = was_frozen | first
    skip = frozen
    if overflow_ptr is not None:
        skip = frozen | (tl.load(overflow_ptr) != 0)
    step = tl.load(step_ptr)
    # Every thread has read what one of them writes.
    tl.debug_barrier()
    tl.store(frozen_ptr, frozen)
    tl.store(mine_ptr, mine)
    tl.store(step_ptr, step + 1, mask=frozen == 0)
    tl.store(skip_ptr, skip)
    tl.store(found_inf_ptr, skip.to(tl.float32))
    for start in range(0, batch, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < tl.where(first, batch, 0)
        tl.store(rows_ptr + place, tl.load(index_ptr + place, mask=inside, other=0), mask=inside)
    if words_ptr is not None:
        for start in range(0, count, BLOCK):
            place = start + tl.arange(0, BLOCK)
            keep, restore = place < tl.where(frozen, 0, count), place < tl.where(frozen, count, 0)
            tl.store(kept_ptr + place, tl.load(words_ptr + place, mask=keep, other=0), mask=keep)
            tl.store(words_ptr + place, tl.load(kept_ptr + place, mask=restore, other=0), mask=restore)


def guard(
    loss: Tensor, own: Tensor, index: Tensor, overflow: Tensor | None, frozen: Tensor, mine: Tensor,
    step: Tensor, rows: Tensor, skip: Tensor, found_inf: Tensor, words: Tensor | None, kept: Tensor | None,
) -> None:  # fmt: skip
    """Write frozen, mine, step, rows, skip and found_inf, and words or kept."""
    with device_guard(loss):
        _guard_kernel[(1,)](
            loss, own, index.contiguous(), overflow, frozen, mine, step, rows, skip, found_inf, words, kept,
            len(index), 0 if words is None else words.numel(), BLOCK=BLOCK, num_warps=WARPS, **LAUNCH,
        )  # fmt: skip
