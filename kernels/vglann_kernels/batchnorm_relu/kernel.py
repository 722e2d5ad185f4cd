"""`batch_norm_relu` in Triton: x is read as rows of channels, as channels-last tensors have them.

A program owns a block of channels and a share of the rows. Its statistics are a mean and a sum of squared differences
from it (M2) for each place of a tile, updated tile by tile (Welford), then joined over places and over programs by
Chan's formula: no sum of squares that cancels, no atomics, the same bits in every run on one GPU. The pass that
normalizes joins the programs' statistics by itself, so that a step has two launches each way. Where rows are few, one
program takes all of a block of channels, and one launch does both passes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LAUNCH, device_guard, processors

# Channels of a program that takes all rows of them (32 bytes of bfloat16), and of one that takes a part (128 bytes).
FEW_CHANNELS, MANY_CHANNELS = 16, 64
# A program with a part of the rows fills a multiprocessor. Each program of the second pass reads all parts.
WARPS, MAX_PARTS = 16, 128
# Values of a tile: for statistics, to normalize (by twice as many programs), with gradients, with all rows.
STATISTICS_TILE, FORWARD_TILE, GRADIENT_TILE, FEW_TILE = 16384, 8192, 8192, 8192


@triton.jit
def joined(count, mean, m2, total):
    """Return mean and M2 [C] of all values, from count [R,1] or [R,C], mean [R,C] and M2 [R,C] of R disjoint sets.

    The mean is corrected once: where it is large against the deviation its rounding is what an error comes from.
    """
    rough = tl.sum(count * mean, axis=0) / total
    off = mean - rough[None, :]
    rest = tl.sum(count * off, axis=0) / total
    return rough + rest, tl.sum(m2 + count * off * off, axis=0) - total * rest * rest


@triton.jit
def place_of(first, channel, channels, ROWS: tl.constexpr):
    """Return the places [ROWS,C] of the values of rows `first` and following."""
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    return row[:, None] * channels + channel[None, :]


@triton.jit
def is_inside(first, last, channel, channels, ROWS: tl.constexpr):
    """Return which of ROWS rows from `first` on lie before `last`, and which channels exist: bool [ROWS,C]."""
    return ((first + tl.arange(0, ROWS)) < last)[:, None] & (channel < channels)[None, :]


@triton.jit
def statistics_of(x_ptr, first, last, channel, channels, ROWS: tl.constexpr):
    """Return mean and M2 [C] of the rows first .. last - 1, at least one of them."""
    CHANNELS: tl.constexpr = channel.shape[0]
    mean = tl.zeros([ROWS, CHANNELS], tl.float32)
    m2 = tl.zeros([ROWS, CHANNELS], tl.float32)
    tiles = 0.0
    for start in range(first, last, ROWS):
        inside = is_inside(start, last, channel, channels, ROWS)
        x = tl.load(x_ptr + place_of(start, channel, channels, ROWS), mask=inside, other=0.0).to(tl.float32)
        tiles += 1.0
        off = tl.where(inside, x - mean, 0.0)
        mean += off * (1.0 / tiles)
        m2 += off * (x - mean)
    seen = (last - first - tl.arange(0, ROWS) + ROWS - 1) // ROWS
    count = tl.maximum(seen, 0).to(tl.float32)[:, None]
    return joined(count, mean, m2, (last - first).to(tl.float32))


@triton.jit
def joined_parts(partials_ptr, parts, rows, rows_each, channel, channels, PARTS: tl.constexpr):
    """Return mean and M2 [C] of all rows, from partials [parts,2,channels] of `rows_each` rows each."""
    part = tl.arange(0, PARTS)
    count = tl.maximum(tl.minimum(rows_each, rows - part.to(tl.int64) * rows_each), 0).to(tl.float32)
    inside = (part < parts)[:, None] & (channel < channels)[None, :]
    at = part[:, None] * 2 * channels + channel[None, :]
    mean = tl.load(partials_ptr + at, mask=inside, other=0.0)
    m2 = tl.load(partials_ptr + at + channels, mask=inside, other=0.0)
    count = tl.where(part < parts, count, 0.0)[:, None]
    return joined(count, mean, m2, rows.to(tl.float32))


@triton.jit
def normalized(x, mean, invstd):
    return (x - mean[None, :]) * invstd[None, :]


@triton.jit
def _statistics_kernel(
    x_ptr, partials_ptr, rows, rows_each, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    # Any float: x [rows,channels]. float32: partials [parts,2,channels], mean and M2 of each part's rows.
    part = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = part * rows_each
    last = tl.minimum(first + rows_each, rows)
    out_ptr = partials_ptr + part * 2 * channels + channel
    mean = tl.zeros([CHANNELS], tl.float32)
    m2 = tl.zeros([CHANNELS], tl.float32)
    if first < last:
        mean, m2 = statistics_of(x_ptr, first, last, channel, channels, ROWS)
    tl.store(out_ptr, mean, mask=channel < channels)
    tl.store(out_ptr + channels, m2, mask=channel < channels)


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, partials_ptr, running_mean_ptr, running_var_ptr, counter_ptr,
    y_ptr, mean_ptr, invstd_ptr, rows, rows_each, channels, all_rows, parts, rows_of_part, momentum, eps,
    TRAINING: tl.constexpr, CUMULATIVE: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # One dtype: x, y [rows,channels]. float32: partials [parts,2,channels] of `rows_of_part` of `all_rows` rows;
    # mean, invstd [channels]. Any float: weight, bias, running_mean, running_var [channels]. int64: counter [].
    # PARTS = 0: this program has all rows, and nothing was left by another launch.
    part = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    first = part * rows_each
    last = tl.minimum(first + rows_each, rows)
    if TRAINING:
        if PARTS > 0:
            mean, m2 = joined_parts(partials_ptr, parts, all_rows, rows_of_part, channel, channels, PARTS)
        else:
            mean, m2 = statistics_of(x_ptr, first, last, channel, channels, ROWS)
        count = all_rows.to(tl.float32)
        var = m2 / count
    else:
        mean = tl.load(running_mean_ptr + channel, mask=exists, other=0.0).to(tl.float32)
        var = tl.load(running_var_ptr + channel, mask=exists, other=1.0).to(tl.float32)
    invstd = 1.0 / tl.sqrt_rn(var + eps)
    if part == 0:
        tl.store(mean_ptr + channel, mean, mask=exists)
        tl.store(invstd_ptr + channel, invstd, mask=exists)
        if TRAINING:
            factor = momentum
            if CUMULATIVE:
                # Counted before this launch, since no program may read what another one writes.
                factor = 1.0 / tl.load(counter_ptr).to(tl.float32)
            elif counter_ptr is not None:
                # No other program may read what this one writes.
                counts = tl.program_id(0) == 0
                tl.store(counter_ptr, tl.load(counter_ptr, mask=counts, other=0) + 1, mask=counts)
            if running_mean_ptr is not None:
                old = tl.load(running_mean_ptr + channel, mask=exists, other=0.0).to(tl.float32)
                tl.store(running_mean_ptr + channel, (1.0 - factor) * old + factor * mean, mask=exists)
            if running_var_ptr is not None:
                old = tl.load(running_var_ptr + channel, mask=exists, other=0.0).to(tl.float32)
                unbiased = m2 / (count - 1.0)
                tl.store(running_var_ptr + channel, (1.0 - factor) * old + factor * unbiased, mask=exists)
    weight = tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    for start in range(first, last, ROWS):
        inside = is_inside(start, last, channel, channels, ROWS)
        place = place_of(start, channel, channels, ROWS)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        value = normalized(x, mean, invstd) * weight[None, :] + bias[None, :]
        # NaN stays NaN, which a maximum with 0 would not keep.
        tl.store(y_ptr + place, tl.where(value <= 0.0, 0.0, value), mask=inside)


@triton.jit
def masked_gradient(x_ptr, grad_ptr, place, inside, mean, invstd, weight, bias):
    """Return (x normalized, gradient behind the ReLU), whose mask is computed again from x."""
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x = normalized(x, mean, invstd)
    return x, tl.where(x * weight[None, :] + bias[None, :] <= 0.0, 0.0, grad)


@triton.jit
def gradient_sums_of(
    x_ptr, grad_ptr, first, last, channel, channels, mean, invstd, weight, bias, ROWS: tl.constexpr
):
    """Return the sums [C] of the gradient and of its product with x normalized, over rows first .. last - 1."""
    CHANNELS: tl.constexpr = channel.shape[0]
    plain = tl.zeros([ROWS, CHANNELS], tl.float32)
    product = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(first, last, ROWS):
        inside = is_inside(start, last, channel, channels, ROWS)
        place = place_of(start, channel, channels, ROWS)
        x, grad = masked_gradient(x_ptr, grad_ptr, place, inside, mean, invstd, weight, bias)
        plain += grad
        product += grad * x
    return tl.sum(plain, axis=0), tl.sum(product, axis=0)


@triton.jit
def _gradient_sums_kernel(
    x_ptr, grad_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, partials_ptr, rows, rows_each, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # One dtype: x, grad [rows,channels]. Any float: weight, bias [channels]. float32: mean, invstd [channels];
    # partials [parts,2,channels], the sums of the gradient and of its product with x normalized.
    part = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    weight = tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + channel, mask=exists, other=0.0)
    invstd = tl.load(invstd_ptr + channel, mask=exists, other=0.0)
    first = part * rows_each
    last = tl.minimum(first + rows_each, rows)
    plain, product = gradient_sums_of(
        x_ptr, grad_ptr, first, last, channel, channels, mean, invstd, weight, bias, ROWS
    )
    out_ptr = partials_ptr + part * 2 * channels + channel
    tl.store(out_ptr, plain, mask=exists)
    tl.store(out_ptr + channels, product, mask=exists)


@triton.jit
def _backward_kernel(
    x_ptr, grad_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, partials_ptr,
    grad_x_ptr, grad_weight_ptr, grad_bias_ptr, rows, rows_each, channels, all_rows, parts,
    TRAINING: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # One dtype: x, grad, grad_x [rows,channels]. Any float: weight, bias, grad_weight, grad_bias [channels].
    # float32: mean, invstd [channels]; partials [parts,2,channels] of `all_rows` rows.
    # PARTS = 0: this program has all rows, and nothing was left by another launch.
    part = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    weight = tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + channel, mask=exists, other=0.0)
    invstd = tl.load(invstd_ptr + channel, mask=exists, other=0.0)
    first = part * rows_each
    last = tl.minimum(first + rows_each, rows)
    if PARTS > 0:
        each = tl.arange(0, PARTS)
        written = (each < parts)[:, None] & exists[None, :]
        at = each[:, None] * 2 * channels + channel[None, :]
        plain = tl.sum(tl.load(partials_ptr + at, mask=written, other=0.0), axis=0)
        product = tl.sum(tl.load(partials_ptr + at + channels, mask=written, other=0.0), axis=0)
    else:
        plain, product = gradient_sums_of(
            x_ptr, grad_ptr, first, last, channel, channels, mean, invstd, weight, bias, ROWS
        )
    if part == 0:
        tl.store(grad_weight_ptr + channel, product, mask=exists)
        tl.store(grad_bias_ptr + channel, plain, mask=exists)
    scale = weight * invstd
    if TRAINING:
        count = all_rows.to(tl.float32)
        plain = plain / count
        product = product / count
    for start in range(first, last, ROWS):
        inside = is_inside(start, last, channel, channels, ROWS)
        place = place_of(start, channel, channels, ROWS)
        x, grad = masked_gradient(x_ptr, grad_ptr, place, inside, mean, invstd, weight, bias)
        if TRAINING:
            grad -= plain[None, :] + x * product[None, :]
        tl.store(grad_x_ptr + place, grad * scale[None, :], mask=inside)


def rows_of(x: Tensor) -> int:
    """Return how many values a channel of x has."""
    return x.numel() // x.shape[1]


def parts_of(x: Tensor) -> int:
    """Return how many programs share the rows of a block of channels; the same for any number of rows."""
    blocks = -(-x.shape[1] // min(MANY_CHANNELS, power_of_2(x.shape[1])))
    return max(1, min(MAX_PARTS, processors(x.device) // blocks))


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


def _launch(x: Tensor, tile: int, parts: int) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """Return the grid (blocks of channels, parts), the rows of a part, and the options.

    With 0 parts a program has all rows of its channels.
    """
    return _planned(x.shape[1], rows_of(x), tile if parts else FEW_TILE, parts)


@cache
def _planned(channels: int, rows: int, tile: int, parts: int) -> tuple[tuple[int, int], int, dict[str, Any]]:
    block = min(MANY_CHANNELS if parts else FEW_CHANNELS, power_of_2(channels))
    each, parts = tile // block, max(1, parts)
    tiles = -(-rows // each)
    # One stage: a pipelined load would touch addresses behind the last row, masked or not.
    options = {"ROWS": each, "CHANNELS": block, "num_warps": WARPS, "num_stages": 1, **LAUNCH}
    return (-(-channels // block), parts), -(-tiles // parts) * each, options


def statistics(x: Tensor) -> Tensor:
    """Return float32 [parts,2,C]: mean and M2 of each part's rows of channels-last x."""
    grid, rows_each, options = _launch(x, STATISTICS_TILE, parts_of(x))
    partials = torch.empty(grid[1], 2, x.shape[1], dtype=torch.float32, device=x.device)
    with device_guard(x):
        _statistics_kernel[grid](x, partials, rows_of(x), rows_each, x.shape[1], **options)
    return partials


def joined_partials(x: Tensor, partials: Tensor, rows_each: int | None = None) -> Tensor:
    """Return [2,C]: mean and M2 of all rows of x, from its `statistics` or from parts of `rows_each` rows."""
    mean, m2 = partials.double().unbind(dim=1)  # [parts,C]
    rows_each = rows_each or _launch(x, STATISTICS_TILE, parts_of(x))[1]
    first = rows_each * torch.arange(len(mean), dtype=torch.int64, device=x.device)
    count = (rows_of(x) - first).clamp(0, rows_each)[:, None]
    total = (count * mean).sum(dim=0) / rows_of(x)
    m2 = (m2 + count * (mean - total).square()).sum(dim=0)
    return torch.stack([total, m2]).float()


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, partials: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, counter: Tensor | None, processes: int, training: bool,
    momentum: float | None, eps: float, rows_of_part: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (y, mean, 1 / deviation) and move the running statistics.

    `partials` is of `statistics`, or has one part of each process, or parts of `rows_of_part` rows; without it a
    program takes all rows.
    A momentum of None averages over all calls, and the counter has counted this one.
    """
    y = torch.empty_like(x)
    mean, invstd = (torch.empty(x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2))
    rows, channels = rows_of(x), x.shape[1]
    few = training and partials is None
    grid, rows_each, options = _launch(x, FORWARD_TILE, 0 if few else 2 * parts_of(x))
    parts = 0 if partials is None else len(partials)
    if rows_of_part is None:
        rows_of_part = rows if processes > 1 else _launch(x, STATISTICS_TILE, parts_of(x))[1]
    with device_guard(x):
        _forward_kernel[grid](
            x, weight, bias, partials, running_mean, running_var, counter, y, mean, invstd,
            rows, rows_each, channels, rows * processes, parts, rows_of_part, momentum or 0.0, eps,
            TRAINING=training, CUMULATIVE=momentum is None and counter is not None,
            PARTS=power_of_2(parts), **options,
        )  # fmt: skip
    return y, mean, invstd


def gradient_sums(
    x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor
) -> Tensor:
    """Return float32 [parts,2,C]: sums of the gradient behind the ReLU, and of its product with x normalized."""
    grid, rows_each, options = _launch(x, GRADIENT_TILE, parts_of(x))
    partials = torch.empty(grid[1], 2, x.shape[1], dtype=torch.float32, device=x.device)
    with device_guard(x):
        _gradient_sums_kernel[grid](
            x, grad, weight, bias, mean, invstd, partials, rows_of(x), rows_each, x.shape[1], **options
        )
    return partials


def backward(
    x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor,
    partials: Tensor | None, processes: int, training: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, weight and bias; `partials` of `gradient_sums`, or None as in `forward`."""
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    rows, channels = rows_of(x), x.shape[1]
    grid, rows_each, options = _launch(x, GRADIENT_TILE, 0 if partials is None else parts_of(x))
    parts = 0 if partials is None else len(partials)
    with device_guard(x):
        _backward_kernel[grid](
            x, grad, weight, bias, mean, invstd, partials, grad_x, grad_weight, grad_bias,
            rows, rows_each, channels, rows * processes, parts,
            TRAINING=training, PARTS=power_of_2(parts), **options,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias
