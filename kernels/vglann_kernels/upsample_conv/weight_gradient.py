"""The gradient of `upsample_conv` by its weights in Triton: products over all positions, in two launches.

A program multiplies its share of the positions of x, as columns, with the output's gradient at some places of the
kernel, and leaves float32 sums. The second launch adds up the shares in a fixed order: no atomics, the same bits in
every run. On the way the first one sums the output's gradient alone, for the bias: the places 1 and 2 of each
dimension of the kernel meet every output once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LAUNCH, device_guard
from .kernel import coordinates, gradient_tile, rectified, sizes_of
from .tiles import power_of_2, splits_of, weight_gradient_tiles


@triton.jit
def _weight_gradient_kernel(
    grad_ptr, x_ptr, scale_ptr, shift_ptr, partials_ptr,
    positions, positions_each, depth: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
    channels: tl.constexpr, outputs: tl.constexpr,
    DIMS: tl.constexpr, TAPS: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    # One dtype: grad [positions,2^DIMS,outputs] in the order of y, x [positions,channels]. Any float: scale, shift
    # [channels]. float32: partials [splits,channels + SUMS,4^DIMS,outputs], whose last row, with SUMS = 1, is of the
    # gradient alone.
    COLUMNS: tl.constexpr = N // TAPS
    GROUPS: tl.constexpr = 4**DIMS // TAPS
    WHOLE_M: tl.constexpr = channels % M == 0
    WHOLE_N: tl.constexpr = outputs % COLUMNS == 0
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    channel = tl.program_id(1) * M + tl.arange(0, M)
    is_channel = channel < channels
    column = tl.arange(0, N)
    tap = tl.program_id(0) % GROUPS * TAPS + column // COLUMNS
    output = tl.program_id(0) // GROUPS * COLUMNS + column % COLUMNS
    is_output = output < outputs
    split = tl.program_id(2)
    first = split * positions_each
    last = tl.minimum(first + positions_each, positions)
    total = tl.zeros([M, N], tl.float32)
    sums = tl.zeros([N], tl.float32)
    for start in range(first, last, P):
        position = start + tl.arange(0, P)
        exists = position < last
        video, z, y, x = coordinates(position, depth, height, width)
        at = tl.where(exists, position, 0).to(tl.int64)[:, None] * channels + channel[None, :]
        inside = exists[:, None]
        if not WHOLE_M:
            inside = inside & is_channel[None, :]
            at = tl.where(inside, at, 0)
        values = tl.load(x_ptr + at, mask=inside, other=0.0)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
            offset = tl.load(shift_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
            values = tl.where(inside, rectified(values, scale, offset, DTYPE), 0.0)
        gradient = gradient_tile(
            grad_ptr, exists, video, z, y, x, tap[None, :], output,
            depth, height, width, outputs, DIMS, WHOLE_N,
        )  # fmt: skip
        total = tl.dot(tl.trans(values), gradient, total, input_precision=PRECISION)
        if SUMS:
            sums += tl.sum(gradient.to(tl.float32), axis=0)
    row = split.to(tl.int64) * (channels + SUMS)
    at = tap * outputs + output
    out = partials_ptr + (row + channel)[:, None] * (4**DIMS * outputs) + at[None, :]
    tl.store(out, total, mask=is_channel[:, None] & is_output[None, :])
    if SUMS:
        # Every block of channels finds the same bits.
        tl.store(partials_ptr + (row + channels) * (4**DIMS * outputs) + at, sums, mask=is_output)


@triton.jit
def _sum_kernel(
    partials_ptr, grad_weight_ptr, sums_ptr, splits, weights, values,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # float32: partials [splits,values]; sums [values - weights]. Any float: grad_weight [weights].
    value = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)
    inside = (split < splits)[:, None] & (value < values)[None, :]
    at = tl.where(inside, split[:, None].to(tl.int64) * values + value[None, :], 0)
    total = tl.sum(tl.load(partials_ptr + at, mask=inside, other=0.0), axis=0)
    tl.store(grad_weight_ptr + value, total, mask=value < weights)
    tl.store(sums_ptr + value - weights, total, mask=(value >= weights) & (value < values))


def weight_gradient(
    grad: Tensor, weight: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None,
    with_sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient by the weights, and float32 [4^n,outputs]: sums of `grad` where each place meets it.

    The sums are [0,outputs] unless asked for.
    """
    dims, (channels, outputs) = x.ndim - 2, weight.shape[:2]
    options = weight_gradient_tiles(dims, channels, outputs, x.dtype == torch.float32)
    positions, *grid = sizes_of(x)
    columns = options["N"] // options["TAPS"]
    programs = 4**dims // options["TAPS"] * -(-outputs // columns), -(-channels // options["M"])
    splits = splits_of(positions, programs[0] * programs[1], options["P"])
    each = -(-positions // splits)
    sums = torch.empty(4**dims if with_sums else 0, outputs, dtype=torch.float32, device=x.device)
    partials = sums.new_empty(splits, channels + with_sums, 4**dims, outputs)
    grad_weight = torch.empty_like(weight)
    values = (channels + with_sums) * 4**dims * outputs
    padded = power_of_2(splits)
    block = max(32, 4096 // padded)
    with device_guard(x):
        _weight_gradient_kernel[(*programs, splits)](
            grad, x, scale, shift, partials, positions, each, *grid, channels, outputs,
            SUMS=int(with_sums), PRECISION="ieee", **options, **LAUNCH,
        )  # fmt: skip
        _sum_kernel[(-(-values // block),)](
            partials, grad_weight, sums, splits, values - sums.numel(), values,
            SPLITS=padded, BLOCK=block, num_warps=4, num_stages=1, **LAUNCH,
        )  # fmt: skip
    return grad_weight, sums
