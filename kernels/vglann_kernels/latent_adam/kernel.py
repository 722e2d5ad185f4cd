"""Row-sparse Adam in Triton: a program owns one row of the batch, or a few rows of the table (dense).

The gather only reads, so that duplicates in a batch cannot race; the step applies the skipped updates of a
row again before its own. The first occurrence of a row sums the gradients of all of them, in batch order, and
alone writes. Where the whole table shares one step counter, the last program to arrive advances it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LAUNCH, device_guard
from .rule import Betas, series_terms

# Rows of the table per program in dense mode.
DENSE_ROWS = 8
# Places of the batch that are compared with a row at once.
MAX_COMPARED = 1024


@triton.jit
def _one_minus_power(steps, log_beta):
    """1 - beta^steps in float32 without cancellation; log_beta = ln(beta), at most 0."""
    x = steps.to(tl.float32) * log_beta
    series = 1.0 + x / 8.0
    series = 1.0 + x / 7.0 * series
    series = 1.0 + x / 6.0 * series
    series = 1.0 + x / 5.0 * series
    series = 1.0 + x / 4.0 * series
    series = 1.0 + x / 3.0 * series
    series = 1.0 + x / 2.0 * series
    return tl.where(x > -0.4, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _without_gradient(z, m, v, start, end, lr, log_beta1, log_beta2, eps, terms, TERMS: tl.constexpr):
    """A row [D] after the steps start + 1 .. end with gradient zero, of which `terms` matter."""
    root = tl.sqrt_rn(v)
    moved = tl.zeros_like(z)
    skipped = end - start
    for first in range(1, tl.minimum(terms, skipped.to(tl.int32)) + 1, TERMS):
        s = first + tl.arange(0, TERMS)  # [TERMS]
        scale = lr * tl.exp(s * log_beta1) / _one_minus_power(start + s, log_beta1)
        shrink = tl.sqrt_rn(tl.exp(s * log_beta2) / _one_minus_power(start + s, log_beta2))
        move = scale[:, None] * m[None, :] / (shrink[:, None] * root[None, :] + eps)  # [TERMS,D]
        moved += tl.sum(tl.where((s <= skipped)[:, None], move, 0.0), axis=0)
    skipped = skipped.to(tl.float32)
    return z - moved, m * tl.exp(skipped * log_beta1), v * tl.exp(skipped * log_beta2)


@triton.jit
def _with_gradient(z, m, v, g, t, lr, beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps):
    """Adam's step number t of z with gradient g; rest = 1 - beta."""
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    scale = lr / _one_minus_power(t, log_beta1)
    root = tl.sqrt_rn(_one_minus_power(t, log_beta2))
    return z - scale * m / (tl.sqrt_rn(v) / root + eps), m, v


@triton.jit
def _advance(step_ptr, arrived_ptr, now, writes):
    """Count this program, which has read `step`; the last program to arrive writes now + 1 if `writes`."""
    # Every thread of this program has read `step` before the program counts as arrived.
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr, 1) == tl.num_programs(0) - 1:
        tl.store(arrived_ptr, 0)
        tl.store(step_ptr, now + 1, mask=writes)


@triton.jit
def _gather_kernel(
    out_ptr, latents_ptr, exp_avg_ptr, exp_avg_sq_ptr, row_step_ptr, step_ptr, index_ptr, lr_ptr, rows, width,
    log_beta1, log_beta2, eps, terms, LAZY: tl.constexpr, TERMS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    # float32: out [batch,width]; latents, exp_avg, exp_avg_sq [rows,width]; lr [].
    # int64: row_step [rows], step [], index [batch].
    b = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, D)
    row = tl.load(index_ptr + b)
    valid = (row >= 0) & (row < rows)
    inside = column < tl.where(valid, width, 0)
    offset = row * width + column
    z = tl.load(latents_ptr + offset, mask=inside, other=float("nan"))
    if LAZY:
        m = tl.load(exp_avg_ptr + offset, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq_ptr + offset, mask=inside, other=0.0)
        start, end = tl.load(row_step_ptr + row, mask=valid, other=0), tl.load(step_ptr)
        z, m, v = _without_gradient(
            z, m, v, start, end, tl.load(lr_ptr).to(tl.float32), log_beta1, log_beta2, eps, terms, TERMS
        )
    tl.store(out_ptr + b * width + column, z, mask=column < width)


@triton.jit
def _next_place(index_ptr, row, b, last, batch, BATCH: tl.constexpr):
    """Return the first place of the batch after `last` that holds `row`, `batch` if none, -1 if one is before b."""
    following = batch
    for start in range(0, batch, BATCH):
        place = start + tl.arange(0, BATCH)
        same = (tl.load(index_ptr + place, mask=place < batch, other=-1) == row) & (place < batch)
        place = tl.where(place < b, -1, tl.where(place > last, place, batch))
        following = tl.minimum(following, tl.min(tl.where(same, place, batch)))
    return following


@triton.jit
def _rows_step_kernel(
    latents_ptr, exp_avg_ptr, exp_avg_sq_ptr, row_step_ptr, step_ptr, arrived_ptr,
    index_ptr, grad_ptr, lr_ptr, skip_ptr, rows, batch, width,
    beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps, terms,
    LAZY: tl.constexpr, SPHERE: tl.constexpr, BALL: tl.constexpr, SKIP: tl.constexpr,
    TERMS: tl.constexpr, BATCH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    # float32: latents, exp_avg, exp_avg_sq [rows,width]; lr []. Any float: grad [batch,width].
    # int64: row_step [rows], step [], index [batch]. int32: arrived []. bool: skip [].
    b = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, D)
    row = tl.load(index_ptr + b)
    g = tl.load(grad_ptr + b * width + column, mask=column < width, other=0.0).to(tl.float32)
    b = b.to(tl.int32)
    # The whole batch is compared once. Places of the same row are few, and most batches have none.
    following = _next_place(index_ptr, row, b, b, batch, BATCH)
    go = True
    if SKIP:
        go = tl.load(skip_ptr) == 0
    writes = (following >= 0) & (row >= 0) & (row < rows) & go
    while (following >= 0) & (following < batch):
        offset = following.to(tl.int64) * width + column
        g += tl.load(grad_ptr + offset, mask=column < width, other=0.0).to(tl.float32)
        following = _next_place(index_ptr, row, b, following, batch, BATCH)
    inside = column < tl.where(writes, width, 0)
    offset = row * width + column
    z = tl.load(latents_ptr + offset, mask=inside, other=0.0)
    m = tl.load(exp_avg_ptr + offset, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq_ptr + offset, mask=inside, other=0.0)
    rate = tl.load(lr_ptr).to(tl.float32)
    t = tl.load(row_step_ptr + row, mask=writes, other=0)
    if LAZY:
        now = tl.load(step_ptr)
        z, m, v = _without_gradient(z, m, v, t, now, rate, log_beta1, log_beta2, eps, terms, TERMS)
        t = now
    t += 1
    z, m, v = _with_gradient(
        z, m, v, g, t, rate, beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps
    )  # fmt: skip
    if SPHERE or BALL:
        norm = tl.sqrt_rn(tl.sum(tl.where(column < width, z * z, 0.0)))
        z = z / tl.where(norm > (1.0 if BALL else 0.0), norm, 1.0)
    tl.store(latents_ptr + offset, z, mask=inside)
    tl.store(exp_avg_ptr + offset, m, mask=inside)
    tl.store(exp_avg_sq_ptr + offset, v, mask=inside)
    tl.store(row_step_ptr + row, t, mask=writes)
    if LAZY:
        _advance(step_ptr, arrived_ptr, now, go)


@triton.jit
def _dense_step_kernel(
    latents_ptr, exp_avg_ptr, exp_avg_sq_ptr, step_ptr, arrived_ptr,
    index_ptr, grad_ptr, lr_ptr, skip_ptr, rows, batch, width,
    beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps,
    SKIP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    # float32: latents, exp_avg, exp_avg_sq [rows,width]; lr []. Any float: grad [batch,width].
    # int64: step [], index [batch]. int32: arrived []. bool: skip [].
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    lowest = tl.program_id(0).to(tl.int64) * ROWS
    go = True
    if SKIP:
        go = tl.load(skip_ptr) == 0
    g = tl.zeros([ROWS, D], tl.float32)
    for b in range(batch):
        hit = tl.load(index_ptr + b)
        if (hit >= lowest) & (hit < lowest + ROWS):
            each = tl.load(grad_ptr + tl.cast(b, tl.int64) * width + column, mask=column < width, other=0.0)
            g += tl.where(row[:, None] == hit, each.to(tl.float32)[None, :], 0.0)
    inside = (row < rows)[:, None] & (column < tl.where(go, width, 0))[None, :]
    offset = row[:, None] * width + column[None, :]
    z = tl.load(latents_ptr + offset, mask=inside, other=0.0)
    m = tl.load(exp_avg_ptr + offset, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq_ptr + offset, mask=inside, other=0.0)
    now = tl.load(step_ptr)
    z, m, v = _with_gradient(
        z, m, v, g, now + 1, tl.load(lr_ptr).to(tl.float32),
        beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps,
    )  # fmt: skip
    tl.store(latents_ptr + offset, z, mask=inside)
    tl.store(exp_avg_ptr + offset, m, mask=inside)
    tl.store(exp_avg_sq_ptr + offset, v, mask=inside)
    _advance(step_ptr, arrived_ptr, now, go)


@triton.jit
def _flush_kernel(
    latents_ptr, exp_avg_ptr, exp_avg_sq_ptr, row_step_ptr, step_ptr, lr_ptr, width,
    log_beta1, log_beta2, eps, terms, TERMS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    # float32: latents, exp_avg, exp_avg_sq [rows,width]; lr []. int64: row_step [rows], step [].
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, D)
    inside, offset = column < width, row * width + column
    z = tl.load(latents_ptr + offset, mask=inside, other=0.0)
    m = tl.load(exp_avg_ptr + offset, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq_ptr + offset, mask=inside, other=0.0)
    start, end = tl.load(row_step_ptr + row), tl.load(step_ptr)
    z, m, v = _without_gradient(
        z, m, v, start, end, tl.load(lr_ptr).to(tl.float32), log_beta1, log_beta2, eps, terms, TERMS
    )
    tl.store(latents_ptr + offset, z, mask=inside)
    tl.store(exp_avg_ptr + offset, m, mask=inside)
    tl.store(exp_avg_sq_ptr + offset, v, mask=inside)
    tl.store(row_step_ptr + row, end)


def _logarithms(betas: Betas) -> tuple[float, float]:
    return tuple(math.log(beta) if beta > 0 else -1e4 for beta in betas)  # type: ignore[return-value]


def _sizes(latents: Tensor) -> dict[str, Any]:
    return {"D": triton.next_power_of_2(latents.shape[1]), "num_warps": 4, **LAUNCH}


def gather(
    latents: Tensor, moments: tuple[Tensor, Tensor], counters: tuple[Tensor, Tensor], index: Tensor,
    lr: Tensor | None, betas: Betas, eps: float, lazy: bool,
) -> Tensor:  # fmt: skip
    """z [B,d], rows `index` of `latents`, brought up to the current step when `lazy`. A bad index gives NaN."""
    out = torch.empty(len(index), latents.shape[1], dtype=latents.dtype, device=latents.device)
    if out.numel():
        with device_guard(latents):
            _gather_kernel[(len(index),)](
                out, latents, *moments, *counters, index.contiguous(), lr, *latents.shape,
                *_logarithms(betas), eps, series_terms(betas, latents.dtype),
                LAZY=lazy, TERMS=8, **_sizes(latents),
            )  # fmt: skip
    return out


def step(
    latents: Tensor, moments: tuple[Tensor, Tensor], counters: tuple[Tensor, Tensor, Tensor], index: Tensor,
    grad: Tensor, lr: Tensor, betas: Betas, eps: float, mode: str, retraction: str | None,
    skip: Tensor | None,
) -> None:  # fmt: skip
    """Take one step in place; counters are (row_step, step, arrived). A bad index writes nothing."""
    rows, width = latents.shape
    rates = (*betas, 1 - betas[0], 1 - betas[1], *_logarithms(betas), eps)
    index, grad = index.contiguous(), grad.contiguous()
    with device_guard(latents):
        if mode == "dense" and latents.numel():
            _dense_step_kernel[(triton.cdiv(rows, DENSE_ROWS),)](
                latents, *moments, *counters[1:], index, grad, lr, skip, rows, len(index), width, *rates,
                SKIP=skip is not None, ROWS=DENSE_ROWS, **_sizes(latents),
            )  # fmt: skip
        elif grad.numel():
            _rows_step_kernel[(len(index),)](
                latents, *moments, *counters, index, grad, lr, skip, rows, len(index), width, *rates,
                series_terms(betas, latents.dtype), LAZY=mode == "lazy",
                SPHERE=retraction == "sphere", BALL=retraction == "ball", SKIP=skip is not None,
                TERMS=8, BATCH=min(MAX_COMPARED, triton.next_power_of_2(len(index))), **_sizes(latents),
            )  # fmt: skip
        elif mode == "lazy":
            # An empty batch is a step, too.
            counters[1].add_(1 if skip is None else ~skip)


def flush(
    latents: Tensor, moments: tuple[Tensor, Tensor], counters: tuple[Tensor, Tensor], lr: Tensor,
    betas: Betas, eps: float,
) -> None:  # fmt: skip
    """Bring every row up to the current step, in place; counters are (row_step, step)."""
    if latents.numel():
        with device_guard(latents):
            _flush_kernel[(latents.shape[0],)](
                latents, *moments, *counters, lr, latents.shape[1], *_logarithms(betas), eps,
                series_terms(betas, latents.dtype), TERMS=8, **_sizes(latents),
            )  # fmt: skip
