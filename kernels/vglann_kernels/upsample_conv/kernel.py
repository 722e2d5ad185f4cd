"""`upsample_conv` in Triton: the output and the gradient by the input, as products without an im2col in memory.

Tensors are channels-last: a position has its channels side by side, and a neighbor lies a fixed number of positions
away. A program multiplies a tile of positions with the weights of one shift after the other. Where the output has
many channels a program makes one phase, from 2 neighbors a dimension. Where it has few, all phases stand side by side
in the columns: 3 neighbors a dimension, whose weights are 0 where a phase does not use them. A position outside is
read as position 0, so that a load that ignores its mask touches nothing outside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batchnorm_relu.kernel import joined
from ..launch import LAUNCH, channels_last_of, device_guard
from .tiles import forward_tiles, input_gradient_tiles, tile_rows

# Programs that join the statistics of the tiles, and parts that they leave for `batch_norm_relu`.
PARTS = 64


@triton.jit
def coordinates(position, depth, height, width):
    """Return (video, plane, row, column) of a position of channels-last x."""
    row = position // width
    plane = row // height
    return plane // depth, plane % depth, row % height, position % width


@triton.jit
def rectified(x, scale, shift, DTYPE: tl.constexpr):
    """Return max(0, scale x + shift); NaN stays NaN."""
    value = x.to(tl.float32) * scale + shift
    return tl.where(value <= 0.0, 0.0, value).to(DTYPE)


@triton.jit
def is_between(value, size):
    return (value >= 0) & (value < size)


@triton.jit
def bits_inside(first, size, COUNT: tl.constexpr, APART: tl.constexpr):
    """Return an integer whose bit `APART * j` says that first + j is in [0, size), for j < COUNT.

    The product of two such integers, the second with its bits COUNT apart, has the bits of all pairs.
    """
    bits = tl.zeros(first.shape, tl.int32)
    for j in tl.static_range(COUNT):
        bits += tl.where(is_between(first + j, size), 1 << (APART * j), 0)
    return bits


@triton.jit
def gradient_tile(
    grad_ptr, exists, video, z, y, x, tap, output,
    depth: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
    outputs: tl.constexpr, DIMS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return the output's gradient [R,C] where R positions meet C pairs of a tap and an output channel.

    tap: one for all columns, or [1,C]. WHOLE: every column is an output channel.
    """
    out_x = 2 * x[:, None] + (tap % 4 - 1)
    out_y = 2 * y[:, None] + (tap // 4 % 4 - 1)
    inside = exists[:, None] & is_between(out_x, 2 * width) & is_between(out_y, 2 * height)
    plane = (video * depth + z).to(tl.int64)[:, None]
    if DIMS == 3:
        out_z = 2 * z[:, None] + (tap // 16 - 1)
        inside = inside & is_between(out_z, 2 * depth)
        plane = 2 * plane + (tap // 16 - 1)
    place = (plane * 2 * height + out_y) * 2 * width + out_x
    if WHOLE:
        at = tl.where(inside, place, 0) * outputs + output[None, :]
    else:
        is_output = output < outputs
        inside = inside & is_output[None, :]
        at = tl.where(inside, place * outputs + output[None, :], 0)
    return tl.load(grad_ptr + at, mask=inside, other=0.0, cache_modifier=".ca")


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr, partials_ptr,
    positions, depth: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
    channels: tl.constexpr, outputs: tl.constexpr,
    DIMS: tl.constexpr, JOINED: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    # One dtype: x [positions,channels], weight [channels,4^DIMS,outputs], y [positions,2^DIMS,outputs] by rows.
    # Any float: bias [outputs], scale, shift [channels].
    # float32: partials [tiles,2^DIMS,2,outputs], mean and M2.
    PHASES: tl.constexpr = 2**DIMS
    SHIFTS: tl.constexpr = 3 if JOINED else 2
    COLUMNS: tl.constexpr = N // PHASES if JOINED else N
    TAPS: tl.constexpr = 4**DIMS
    program = tl.program_id(0)
    column = tl.arange(0, N)
    if JOINED:
        tile = program
        phase = column[None, :] // COLUMNS
        output = column % COLUMNS
    else:
        tile = program // PHASES
        phase = program % PHASES
        output = tl.program_id(1) * N + column
    phase_x = phase % 2
    phase_y = phase // 2 % 2
    phase_z = phase // 4
    is_output = output < outputs
    position = tile * M + tl.arange(0, M)
    exists = position < positions
    video, z, y, x = coordinates(position, depth, height, width)
    inner = tl.arange(0, K)
    # Without remainders no column needs a mask, and accesses are as wide as they can be.
    WHOLE_K: tl.constexpr = channels % K == 0
    WHOLE_N: tl.constexpr = outputs % COLUMNS == 0
    blocks: tl.constexpr = (channels + K - 1) // K
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    total = tl.zeros([M, N], tl.float32)
    # The first shift of each dimension; the others follow it.
    low_x, low_y, low_z = -1, -1, -1
    if not JOINED:
        low_x, low_y, low_z = phase_x - 1, phase_y - 1, phase_z - 1
    ALL: tl.constexpr = SHIFTS**DIMS
    bits = bits_inside(x + low_x, width, SHIFTS, 1) * bits_inside(y + low_y, height, SHIFTS, SHIFTS)
    if DIMS == 3:
        bits *= bits_inside(z + low_z, depth, SHIFTS, SHIFTS * SHIFTS)
    bits = tl.where(exists, bits, 0)
    # All shifts of a block of channels before the next one, so that L1 holds what they share.
    for step in range(ALL * blocks):
        shift = step % ALL
        channel = step // ALL * K + inner
        is_channel = channel < channels
        dx = shift % SHIFTS + low_x
        dy = shift // SHIFTS % SHIFTS + low_y
        away = dy * width + dx
        tap_x = phase_x + 1 - 2 * dx
        tap_y = phase_y + 1 - 2 * dy
        tap = tap_y * 4 + tap_x
        if DIMS == 3:
            dz = shift // (SHIFTS * SHIFTS) + low_z
            away += dz * (height * width)
            tap_z = phase_z + 1 - 2 * dz
            tap += tap_z * 16
        inside = ((bits >> shift) & 1) != 0
        neighbor = tl.where(inside, position + away, 0).to(tl.int64)
        at = neighbor[:, None] * channels + channel[None, :]
        present = inside[:, None]
        if not WHOLE_K:
            present = present & is_channel[None, :]
            at = tl.where(present, at, 0)
        values = tl.load(x_ptr + at, mask=present, other=0.0, cache_modifier=".ca")
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
            offset = tl.load(shift_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
            # What lies outside is 0, whatever the shift.
            values = tl.where(present, rectified(values, scale, offset, DTYPE), 0.0)
        at = (channel[:, None] * TAPS + tap) * outputs + output[None, :]
        if JOINED:
            # A phase uses two of the three shifts of a dimension.
            wanted = is_between(tap_x, 4) & is_between(tap_y, 4)
            if DIMS == 3:
                wanted = wanted & is_between(tap_z, 4)
            at = channel[:, None] * (TAPS * outputs) + tl.where(wanted, tap, 0) * outputs + output[None, :]
        if not (WHOLE_K and WHOLE_N):
            used = is_channel[:, None] & is_output[None, :]
            if JOINED:
                used = used & wanted
            weights = tl.load(weight_ptr + tl.where(used, at, 0), mask=used, other=0.0)
        elif JOINED:
            weights = tl.load(weight_ptr + at, mask=tl.broadcast_to(wanted, [K, N]), other=0.0)
        else:
            weights = tl.load(weight_ptr + at)
        total = tl.dot(values, weights, total, input_precision=PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    result = total.to(DTYPE)
    plane = (video * depth + z).to(tl.int64)[:, None]
    if DIMS == 3:
        plane = plane * 2 + phase_z
    place = (plane * 2 * height + (2 * y[:, None] + phase_y)) * 2 * width + (2 * x[:, None] + phase_x)
    tl.store(y_ptr + place * outputs + output[None, :], result, mask=exists[:, None] & is_output[None, :])
    if partials_ptr is not None:
        count = tl.minimum(positions - tile * M, M).to(tl.float32)
        rounded = tl.where(exists[:, None], result.to(tl.float32), 0.0)
        mean = tl.sum(rounded, axis=0) / count
        off = tl.where(exists[:, None], rounded - mean[None, :], 0.0)
        part = tile * PHASES + (column // COLUMNS if JOINED else phase)
        out = partials_ptr + part.to(tl.int64) * 2 * outputs + output
        tl.store(out, mean, mask=is_output)
        tl.store(out + outputs, tl.sum(off * off, axis=0), mask=is_output)


@triton.jit
def _input_gradient_kernel(
    grad_ptr, weight_ptr, x_ptr, scale_ptr, shift_ptr, grad_x_ptr, partials_ptr,
    positions, depth: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
    channels: tl.constexpr, outputs: tl.constexpr,
    DIMS: tl.constexpr, JOINED: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    # One dtype: grad [positions,2^DIMS,outputs] in the order of y, weight [channels,4^DIMS,outputs],
    # x, grad_x [positions,channels]. Any float: scale, shift [channels].
    # float32: partials [tiles,2,channels], parts of the gradients by scale and shift.
    # JOINED > 0: so many taps stand side by side in a step.
    TAPS: tl.constexpr = 4**DIMS
    tile = tl.program_id(0)
    channel = tl.program_id(1) * N + tl.arange(0, N)
    is_channel = channel < channels
    position = tile * M + tl.arange(0, M)
    exists = position < positions
    video, z, y, x = coordinates(position, depth, height, width)
    inner = tl.arange(0, K)
    COLUMNS: tl.constexpr = K // JOINED if JOINED > 0 else K
    WHOLE_K: tl.constexpr = outputs % COLUMNS == 0
    WHOLE_N: tl.constexpr = channels % N == 0
    blocks: tl.constexpr = (outputs + COLUMNS - 1) // COLUMNS
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty
    total = tl.zeros([M, N], tl.float32)
    STEPS: tl.constexpr = TAPS // JOINED if JOINED > 0 else TAPS * blocks
    for step in range(STEPS):
        if JOINED > 0:
            tap = step * JOINED + (inner // COLUMNS)[None, :]
            output = inner % COLUMNS
        else:
            tap = step // blocks
            output = step % blocks * K + inner
        values = gradient_tile(
            grad_ptr, exists, video, z, y, x, tap, output, depth, height, width, outputs, DIMS, WHOLE_K
        )
        if JOINED > 0:
            tap = step * JOINED + (inner // COLUMNS)[:, None]
        at = (channel[None, :] * TAPS + tap) * outputs + output[:, None]
        if WHOLE_K and WHOLE_N:
            weights = tl.load(weight_ptr + at)
        else:
            used = is_channel[None, :] & (output < outputs)[:, None]
            weights = tl.load(weight_ptr + tl.where(used, at, 0), mask=used, other=0.0)
        total = tl.dot(values, weights, total, input_precision=PRECISION)
    own = position[:, None].to(tl.int64) * channels + channel[None, :]
    present = exists[:, None] & is_channel[None, :]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        offset = tl.load(shift_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        value = tl.load(x_ptr + own, mask=present, other=0.0).to(tl.float32)
        total = tl.where(value * scale + offset <= 0.0, 0.0, total)
        out = partials_ptr + tile.to(tl.int64) * 2 * channels + channel
        tl.store(out, tl.sum(total * value, axis=0), mask=is_channel)
        tl.store(out + channels, tl.sum(total, axis=0), mask=is_channel)
        total = total * scale
    tl.store(grad_x_ptr + own, total.to(DTYPE), mask=present)


@triton.jit
def _join_kernel(
    partials_ptr, joined_ptr, positions, tiles, tiles_each, outputs,
    PHASES: tl.constexpr, M: tl.constexpr, AT_ONCE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # float32: partials [tiles,PHASES,2,outputs] of M positions each; joined [programs,2,outputs], mean and M2.
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < outputs
    first = tl.program_id(0) * tiles_each * PHASES
    last = tl.minimum(tl.program_id(0) * tiles_each + tiles_each, tiles) * PHASES
    seen = 0.0
    mean = tl.zeros([CHANNELS], tl.float32)
    m2 = tl.zeros([CHANNELS], tl.float32)
    for start in range(first, last, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)
        inside = (part < last)[:, None] & exists[None, :]
        count = tl.where(part < last, tl.minimum(positions - part // PHASES * M, M), 0).to(tl.float32)
        at = part[:, None].to(tl.int64) * 2 * outputs + channel[None, :]
        means = tl.load(partials_ptr + at, mask=inside, other=0.0)
        squares = tl.load(partials_ptr + at + outputs, mask=inside, other=0.0)
        new = tl.sum(count, axis=0)
        new_mean, new_m2 = joined(count[:, None], means, squares, new)
        # Chan's formula.
        off = new_mean - mean
        mean += off * (new / (seen + new))
        m2 += new_m2 + off * off * (seen * new / (seen + new))
        seen += new
    out = joined_ptr + tl.program_id(0) * 2 * outputs + channel
    tl.store(out, mean, mask=exists)
    tl.store(out + outputs, m2, mask=exists)


def sizes_of(x: Tensor) -> tuple[int, int, int, int]:
    """Return (positions, depth, height, width) of x; an image has a depth of 1."""
    depth, height, width = (1, *x.shape[2:])[-3:]
    return x.shape[0] * depth * height * width, depth, height, width


def output_shape(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """Return the shape of y."""
    return (x.shape[0], weight.shape[1], *(2 * size for size in x.shape[2:]))


def tiles_of(x: Tensor) -> int:
    """Return how many tiles the positions of x make."""
    return -(-sizes_of(x)[0] // tile_rows(x.dtype == torch.float32))


def rows_of_a_part(x: Tensor) -> int:
    """Return how many rows each part of the statistics has, until all are dealt out: whole tiles of all phases."""
    return -(-tiles_of(x) // PARTS) * tile_rows(x.dtype == torch.float32) * 2 ** (x.ndim - 2)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and float32 [PARTS,2,outputs]: mean and M2 of each part of its rows; [0,2,outputs] unless asked."""
    dims, (channels, outputs) = x.ndim - 2, weight.shape[:2]
    options = forward_tiles(dims, channels, outputs, x.dtype == torch.float32)
    positions, *grid = sizes_of(x)
    tiles = tiles_of(x)
    y = torch.empty(
        output_shape(x, weight), dtype=x.dtype, device=x.device, memory_format=channels_last_of(x)
    )
    joined_parts = torch.empty(PARTS if statistics else 0, 2, outputs, dtype=torch.float32, device=x.device)
    partials = joined_parts.new_empty(tiles, 2**dims, 2, outputs) if statistics else None
    blocks = 1 if options["JOINED"] else -(-outputs // options["N"])
    programs = tiles if options["JOINED"] else tiles * 2**dims
    with device_guard(x):
        _forward_kernel[(programs, blocks)](
            x, weight, bias, scale, shift, y, partials, positions, *grid, channels, outputs,
            PRECISION="ieee", **options, **LAUNCH,
        )  # fmt: skip
        if partials is not None:
            _join_kernel[(PARTS, -(-outputs // 16))](
                partials, joined_parts, positions, tiles, -(-tiles // PARTS), outputs,
                PHASES=2**dims, M=options["M"], AT_ONCE=128, CHANNELS=16, num_warps=4, num_stages=1, **LAUNCH,
            )  # fmt: skip
    return y, joined_parts


def input_gradient(
    grad: Tensor, weight: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradient by x, and float32 [tiles,2,channels]: parts of the gradients by scale and shift."""
    dims, (channels, outputs) = x.ndim - 2, weight.shape[:2]
    options = input_gradient_tiles(dims, channels, outputs, x.dtype == torch.float32)
    positions, *grid = sizes_of(x)
    tiles = tiles_of(x)
    grad_x = torch.empty_like(x)
    partials = torch.empty(
        tiles if scale is not None else 0, 2, channels, dtype=torch.float32, device=x.device
    )
    with device_guard(x):
        _input_gradient_kernel[(tiles, -(-channels // options["N"]))](
            grad, weight, x, scale, shift, grad_x, partials, positions, *grid, channels, outputs,
            PRECISION="ieee", **options, **LAUNCH,
        )  # fmt: skip
    return grad_x, partials
