"""`mask_composite` in Triton: a program owns a block of pixels of one video and loops over its frames.

The background is read once and, in the backward pass, its gradient is a sum in registers: no atomics. Where
videos are few, several programs share a block's frames and leave partial sums. Nothing is saved between the
passes except the inputs; activations are computed again. The video is always written planar, with wide stores.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LAUNCH, dense, device_guard, is_channels_last

# Pixels and warps of a program, by the head being channels-last. Planar: 8 pixels a thread, 16-byte accesses of
# bfloat16. Channels-last: 2 pixels a thread, which are 16 bytes of the head and 4 of each plane of the video; with
# more, pixels have to change threads through shared memory between the two layouts.
TILES = {False: (512, 2), True: (256, 4)}
# Fewer videos than this share the frames of a pixel block among MAX_PARTS programs, to fill the GPU.
MANY_VIDEOS, MAX_PARTS = 64, 4
SUM_BLOCK = 1024


@triton.jit
def sigmoid(x):
    # exp may be infinite: the quotient is then 0, as it should be.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # The absolute error is under 2e-7.
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def load_head(frame_ptr, first, count, channel_stride, CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr):
    """Load four channels of PIXELS pixels from pixel `first` on, as float32; pixels from `count` on are 0.

    `frame_ptr` points at the first value of the frame.
    """
    if CHANNELS_LAST:
        # The channels of a pixel are neighbors: one dense run of values, taken apart in registers.
        place = first * 4 + tl.arange(0, 4 * PIXELS)
        x = tl.load(frame_ptr + place, mask=place < count * 4, other=0.0)
        # Channels (0, 2) and (1, 3).
        even, odd = tl.split(tl.reshape(x, [PIXELS, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
    else:
        pixel = first + tl.arange(0, PIXELS)
        inside = pixel < count
        x0 = tl.load(frame_ptr + pixel, mask=inside, other=0.0)
        x1 = tl.load(frame_ptr + channel_stride + pixel, mask=inside, other=0.0)
        x2 = tl.load(frame_ptr + 2 * channel_stride + pixel, mask=inside, other=0.0)
        x3 = tl.load(frame_ptr + 3 * channel_stride + pixel, mask=inside, other=0.0)
    return x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)


@triton.jit
def store_head(frame_ptr, first, count, channel_stride, x0, x1, x2, x3, CHANNELS_LAST: tl.constexpr):
    """Store what `load_head` loads, rounded to the dtype of `frame_ptr`."""
    PIXELS: tl.constexpr = x0.shape[0]
    if CHANNELS_LAST:
        dtype = frame_ptr.dtype.element_ty
        even, odd = tl.join(x0.to(dtype), x2.to(dtype)), tl.join(x1.to(dtype), x3.to(dtype))
        place = first * 4 + tl.arange(0, 4 * PIXELS)
        tl.store(frame_ptr + place, tl.reshape(tl.join(even, odd), [4 * PIXELS]), mask=place < count * 4)
    else:
        pixel = first + tl.arange(0, PIXELS)
        inside = pixel < count
        tl.store(frame_ptr + pixel, x0, mask=inside)
        tl.store(frame_ptr + channel_stride + pixel, x1, mask=inside)
        tl.store(frame_ptr + 2 * channel_stride + pixel, x2, mask=inside)
        tl.store(frame_ptr + 3 * channel_stride + pixel, x3, mask=inside)


@triton.jit
def load_background(back_ptr, pixel, inside, channel_stride, pixel_stride):
    """Load the activated background at `pixel`, three channels as float32."""
    back_ptr += pixel * pixel_stride
    b0 = tl.load(back_ptr, mask=inside, other=0.0).to(tl.float32)
    b1 = tl.load(back_ptr + channel_stride, mask=inside, other=0.0).to(tl.float32)
    b2 = tl.load(back_ptr + 2 * channel_stride, mask=inside, other=0.0).to(tl.float32)
    return tanh(b0), tanh(b1), tanh(b2)


@triton.jit
def _composite_fwd_kernel(
    head_ptr, background_ptr, video_ptr, mask_means_ptr, frames, frames_each, pixels,
    head_channel_stride, back_channel_stride, back_pixel_stride,
    PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    # One float dtype: head [B,4,frames,pixels], background [B,3,pixels], video [B,3,frames,pixels] contiguous.
    # float32: mask_means [B,parts,blocks], which sum to the means.
    block, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = block * PIXELS
    pixel = first + tl.arange(0, PIXELS)
    inside = pixel < pixels
    back_ptr = background_ptr + b * 3 * pixels
    b0, b1, b2 = load_background(back_ptr, pixel, inside, back_channel_stride, back_pixel_stride)
    total = tl.zeros([PIXELS], tl.float32)
    first_frame = part * frames_each
    step = pixels * 4 if CHANNELS_LAST else pixels
    frame_ptr = head_ptr + b * 4 * pixels * frames + first_frame * step
    out_ptr = video_ptr + b * 3 * pixels * frames + first_frame * pixels
    channel_stride = tl.cast(frames, tl.int64) * pixels
    for _ in range(tl.minimum(frames_each, frames - first_frame)):
        f0, f1, f2, x3 = load_head(frame_ptr, first, pixels, head_channel_stride, CHANNELS_LAST, PIXELS)
        m = sigmoid(x3)
        total += tl.where(inside, m, 0.0)
        tl.store(out_ptr + pixel, m * tanh(f0) + (1.0 - m) * b0, mask=inside)
        tl.store(out_ptr + channel_stride + pixel, m * tanh(f1) + (1.0 - m) * b1, mask=inside)
        tl.store(out_ptr + 2 * channel_stride + pixel, m * tanh(f2) + (1.0 - m) * b2, mask=inside)
        frame_ptr += step
        out_ptr += pixels
    place = (b * tl.num_programs(1) + part) * tl.num_programs(0) + block
    tl.store(mask_means_ptr + place, tl.sum(total) / (frames * pixels))


@triton.jit
def _composite_bwd_kernel(
    head_ptr, background_ptr, grad_video_ptr, grad_mask_mean_ptr, grad_head_ptr, grad_back_ptr,
    frames, frames_each, pixels, head_channel_stride, back_channel_stride, back_pixel_stride,
    grad_back_channel_stride, grad_back_pixel_stride, grad_b_stride, grad_c_stride, grad_t_stride, grad_pixel_stride,
    PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    # One float dtype: head, grad_head [B,4,frames,pixels]; background [B,3,pixels]; grad_video [B,3,frames,pixels].
    # grad_back [B,parts,3,pixels]: any float. float32: grad_mask_mean [B]. An upstream gradient of None is zeros.
    block, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = block * PIXELS
    pixel = first + tl.arange(0, PIXELS)
    inside = pixel < pixels
    back_ptr = background_ptr + b * 3 * pixels
    b0, b1, b2 = load_background(back_ptr, pixel, inside, back_channel_stride, back_pixel_stride)
    prior = 0.0
    if grad_mask_mean_ptr is not None:
        prior = tl.load(grad_mask_mean_ptr + b).to(tl.float32) / (frames * pixels)
    s0 = tl.zeros([PIXELS], tl.float32)
    s1 = tl.zeros([PIXELS], tl.float32)
    s2 = tl.zeros([PIXELS], tl.float32)
    first_frame = part * frames_each
    step = pixels * 4 if CHANNELS_LAST else pixels
    frame_ptr = head_ptr + b * 4 * pixels * frames + first_frame * step
    grad_frame_ptr = grad_head_ptr + b * 4 * pixels * frames + first_frame * step
    upstream_offset = b * grad_b_stride + tl.cast(first_frame, tl.int64) * grad_t_stride
    for _ in range(tl.minimum(frames_each, frames - first_frame)):
        f0, f1, f2, x3 = load_head(frame_ptr, first, pixels, head_channel_stride, CHANNELS_LAST, PIXELS)
        f0, f1, f2, m = tanh(f0), tanh(f1), tanh(f2), sigmoid(x3)
        h0 = tl.zeros([PIXELS], tl.float32)
        h1 = tl.zeros([PIXELS], tl.float32)
        h2 = tl.zeros([PIXELS], tl.float32)
        gm = prior + tl.zeros([PIXELS], tl.float32)
        if grad_video_ptr is not None:
            grad_ptr = grad_video_ptr + upstream_offset + pixel * grad_pixel_stride
            g0 = tl.load(grad_ptr, mask=inside, other=0.0).to(tl.float32)
            g1 = tl.load(grad_ptr + grad_c_stride, mask=inside, other=0.0).to(tl.float32)
            g2 = tl.load(grad_ptr + 2 * grad_c_stride, mask=inside, other=0.0).to(tl.float32)
            gm += g0 * (f0 - b0) + g1 * (f1 - b1) + g2 * (f2 - b2)
            s0 += g0 * (1.0 - m)
            s1 += g1 * (1.0 - m)
            s2 += g2 * (1.0 - m)
            h0 = g0 * m * (1.0 - f0 * f0)
            h1 = g1 * m * (1.0 - f1 * f1)
            h2 = g2 * m * (1.0 - f2 * f2)
        gm *= m * (1.0 - m)
        store_head(grad_frame_ptr, first, pixels, head_channel_stride, h0, h1, h2, gm, CHANNELS_LAST)
        frame_ptr += step
        grad_frame_ptr += step
        upstream_offset += grad_t_stride
    if grad_video_ptr is not None:
        s0 *= 1.0 - b0 * b0
        s1 *= 1.0 - b1 * b1
        s2 *= 1.0 - b2 * b2
    back_ptr = grad_back_ptr + (b * tl.num_programs(1) + part) * 3 * pixels + pixel * grad_back_pixel_stride
    tl.store(back_ptr, s0, mask=inside)
    tl.store(back_ptr + grad_back_channel_stride, s1, mask=inside)
    tl.store(back_ptr + 2 * grad_back_channel_stride, s2, mask=inside)


@triton.jit
def _sum_parts_kernel(
    partials_ptr, sums_ptr, parts, pixels, channel_stride, pixel_stride, BLOCK: tl.constexpr
):
    # float32: partials [B,parts,3,pixels]. Any float: sums [B,3,pixels].
    b, c = tl.program_id(2).to(tl.int64), tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    total = tl.zeros([BLOCK], tl.float32)
    part_ptr = partials_ptr + (b * parts * 3 + c) * pixels + pixel
    for _ in range(parts):
        total += tl.load(part_ptr, mask=inside, other=0.0)
        part_ptr += 3 * pixels
    tl.store(sums_ptr + b * 3 * pixels + c * channel_stride + pixel * pixel_stride, total, mask=inside)


def background_strides(background: Tensor) -> tuple[int, int]:
    """Return the strides of channel and pixel of a dense background [B,3,H,W]."""
    return (1, 3) if is_channels_last(background) else (background.shape[2] * background.shape[3], 1)


def sum_parts(partials: Tensor, background: Tensor) -> Tensor:
    """Return the gradient of `background` [B,3,H,W] from partial sums float32 [B,parts,3,H,W], added in order."""
    sums = torch.empty_like(background)
    batch, parts, _, height, width = partials.shape
    pixels = height * width
    if sums.numel():
        with device_guard(partials):
            _sum_parts_kernel[(triton.cdiv(pixels, SUM_BLOCK), 3, batch)](
                partials, sums, parts, pixels, *background_strides(sums), BLOCK=SUM_BLOCK, num_warps=4,
                **LAUNCH,
            )  # fmt: skip
    return sums


def _grid(head: Tensor) -> tuple[tuple[int, int, int], int, dict[str, Any]]:
    """Return the grid (pixel blocks, parts, videos), the frames of a part, and the options of the launch."""
    batch, _, frames, height, width = head.shape
    last = is_channels_last(head)
    pixels, warps = TILES[last]
    options = {"PIXELS": pixels, "CHANNELS_LAST": last, "num_warps": warps, **LAUNCH}
    parts = 1 if batch >= MANY_VIDEOS else min(MAX_PARTS, max(1, frames))
    return (triton.cdiv(height * width, pixels), parts, batch), triton.cdiv(frames, parts), options


def composite_fwd(head: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Return (video, mask_mean float32 [B]). The video is contiguous."""
    head, background = dense(head), dense(background)
    batch, _, frames, height, width = head.shape
    pixels = height * width
    video = torch.empty(batch, 3, frames, height, width, dtype=head.dtype, device=head.device)
    grid, frames_each, options = _grid(head)
    mask_means = torch.empty(batch, grid[1], grid[0], dtype=torch.float32, device=head.device)
    if mask_means.numel():
        with device_guard(head):
            _composite_fwd_kernel[grid](
                head, background, video, mask_means, frames, frames_each, pixels,
                frames * pixels, *background_strides(background), **options,
            )  # fmt: skip
    return video, mask_means.sum(dim=(1, 2))


def composite_bwd(
    head: Tensor, background: Tensor, grad_video: Tensor | None, grad_mask_mean: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (grad_head, grad_background) in the layouts of `head` and `background`.

    `grad_video` may have any strides. None stands for a gradient of zeros.
    """
    head, background = dense(head), dense(background)
    batch, _, frames, height, width = head.shape
    pixels = height * width
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if grad_video is not None:
        # So no offset within a frame is larger than in a dense frame, and all fit into 32 bits.
        if grad_video.stride(3) != width * grad_video.stride(4) or grad_video.stride(4) not in (0, 1, 3):
            grad_video = grad_video.contiguous()
        strides = (*grad_video.stride()[:3], grad_video.stride(4))
    if grad_mask_mean is not None:
        grad_mask_mean = grad_mask_mean.contiguous()
    grad_head = torch.empty_like(head)
    grid, frames_each, options = _grid(head)
    # Partial sums of the parts, or the gradient itself where there is one part.
    grad_back = torch.empty_like(background)
    if grid[1] > 1:
        grad_back = torch.empty(batch * grid[1], 3, height, width, dtype=torch.float32, device=head.device)
    if grad_back.numel():
        with device_guard(head):
            _composite_bwd_kernel[grid](
                head, background, grad_video, grad_mask_mean, grad_head, grad_back,
                frames, frames_each, pixels, frames * pixels, *background_strides(background),
                *background_strides(grad_back), *strides, **options,
            )  # fmt: skip
    if grid[1] > 1:
        grad_back = sum_parts(grad_back.unflatten(0, (batch, grid[1])), background)
    return grad_head, grad_back
