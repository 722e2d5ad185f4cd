"""`mask_composite` in Triton: a program owns a block of pixels of one video and walks over its frames.

The background is read once and, in the backward, its gradient is a sum the program keeps in registers: no
atomics. Nothing is saved between the passes but the inputs; activations are computed again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import dense, device_guard, is_channels_last, laid_out_as

PIXELS, WARPS = 512, 4  # 4 pixels a thread: 8-byte loads of bfloat16
MANY_VIDEOS = 64  # from here on one program per pixel block fills the GPU; below, the forward splits T


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))  # exp may be inf: the quotient is then 0, as it should be


@triton.jit
def tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0  # absolute error under 2e-7


@triton.jit
def load_head(frame, pixel, inside, plane, CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr):
    """The four channels at `pixel` of one frame as float32; `frame` points at its first number."""
    if CHANNELS_LAST:  # the four numbers of a pixel are neighbours: one wide load
        channel = tl.arange(0, 4)[None, :]
        x = tl.load(frame + pixel[:, None] * 4 + channel, mask=inside[:, None], other=0.0)
        even, odd = tl.split(tl.reshape(x, [PIXELS, 2, 2]))  # channels (0, 2) and (1, 3)
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
    else:
        x0 = tl.load(frame + pixel, mask=inside, other=0.0)
        x1 = tl.load(frame + plane + pixel, mask=inside, other=0.0)
        x2 = tl.load(frame + 2 * plane + pixel, mask=inside, other=0.0)
        x3 = tl.load(frame + 3 * plane + pixel, mask=inside, other=0.0)
    return x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)


@triton.jit
def store_head(frame, pixel, inside, plane, x0, x1, x2, x3, CHANNELS_LAST: tl.constexpr):
    """The reverse of `load_head`, rounding to the dtype `frame` points at."""
    if CHANNELS_LAST:
        x = tl.join(tl.join(x0, x2), tl.join(x1, x3))  # [PIXELS,2,2]
        x = tl.reshape(x, [x0.shape[0], 4])
        channel = tl.arange(0, 4)[None, :]
        tl.store(frame + pixel[:, None] * 4 + channel, x, mask=inside[:, None])
    else:
        tl.store(frame + pixel, x0, mask=inside)
        tl.store(frame + plane + pixel, x1, mask=inside)
        tl.store(frame + 2 * plane + pixel, x2, mask=inside)
        tl.store(frame + 3 * plane + pixel, x3, mask=inside)


@triton.jit
def _composite_fwd_kernel(
    head, background, video, mask_sums,
    frames, frames_each, pixels, head_channel, back_channel, back_pixel, video_channel, video_pixel,
    PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    block, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pixel = block * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    back = background + b * 3 * pixels + pixel * back_pixel
    b0 = tanh(tl.load(back, mask=inside, other=0.0).to(tl.float32))
    b1 = tanh(tl.load(back + back_channel, mask=inside, other=0.0).to(tl.float32))
    b2 = tanh(tl.load(back + 2 * back_channel, mask=inside, other=0.0).to(tl.float32))
    total = tl.zeros([PIXELS], tl.float32)
    first = part * frames_each
    step = pixels * 4 if CHANNELS_LAST else pixels
    out_step = pixels * 3 if CHANNELS_LAST else pixels
    frame = head + b * 4 * pixels * frames + first * step
    out = video + b * 3 * pixels * frames + first * out_step
    for _ in range(tl.minimum(frames_each, frames - first)):
        f0, f1, f2, x3 = load_head(frame, pixel, inside, head_channel, CHANNELS_LAST, PIXELS)
        m = sigmoid(x3)
        total += tl.where(inside, m, 0.0)
        at = out + pixel * video_pixel
        tl.store(at, m * tanh(f0) + (1.0 - m) * b0, mask=inside)
        tl.store(at + video_channel, m * tanh(f1) + (1.0 - m) * b1, mask=inside)
        tl.store(at + 2 * video_channel, m * tanh(f2) + (1.0 - m) * b2, mask=inside)
        frame += step
        out += out_step
    place = (b * tl.num_programs(1) + part) * tl.num_programs(0) + block
    tl.store(mask_sums + place, tl.sum(total))


@triton.jit
def _composite_bwd_kernel(
    head, background, grad_video, grad_mask_mean, grad_head, grad_background,
    frames, pixels, head_channel, back_channel, back_pixel, grad_b, grad_c, grad_t, grad_pixel,
    PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    block, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pixel = block * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    at = b * 3 * pixels + pixel * back_pixel
    b0 = tanh(tl.load(background + at, mask=inside, other=0.0).to(tl.float32))
    b1 = tanh(tl.load(background + at + back_channel, mask=inside, other=0.0).to(tl.float32))
    b2 = tanh(tl.load(background + at + 2 * back_channel, mask=inside, other=0.0).to(tl.float32))
    prior = tl.load(grad_mask_mean + b).to(tl.float32) / (frames * pixels)
    s0 = tl.zeros([PIXELS], tl.float32)
    s1 = tl.zeros([PIXELS], tl.float32)
    s2 = tl.zeros([PIXELS], tl.float32)
    step = pixels * 4 if CHANNELS_LAST else pixels
    frame = head + b * 4 * pixels * frames
    grad_frame = grad_head + b * 4 * pixels * frames
    upstream = grad_video + b * grad_b
    for _ in range(frames):
        f0, f1, f2, x3 = load_head(frame, pixel, inside, head_channel, CHANNELS_LAST, PIXELS)
        f0, f1, f2, m = tanh(f0), tanh(f1), tanh(f2), sigmoid(x3)
        g = upstream + pixel * grad_pixel
        g0 = tl.load(g, mask=inside, other=0.0).to(tl.float32)
        g1 = tl.load(g + grad_c, mask=inside, other=0.0).to(tl.float32)
        g2 = tl.load(g + 2 * grad_c, mask=inside, other=0.0).to(tl.float32)
        gm = g0 * (f0 - b0) + g1 * (f1 - b1) + g2 * (f2 - b2) + prior
        s0 += g0 * (1.0 - m)
        s1 += g1 * (1.0 - m)
        s2 += g2 * (1.0 - m)
        store_head(
            grad_frame, pixel, inside, head_channel,
            g0 * m * (1.0 - f0 * f0), g1 * m * (1.0 - f1 * f1), g2 * m * (1.0 - f2 * f2),
            gm * m * (1.0 - m), CHANNELS_LAST,
        )  # fmt: skip
        frame += step
        grad_frame += step
        upstream += grad_t
    tl.store(grad_background + at, s0 * (1.0 - b0 * b0), mask=inside)
    tl.store(grad_background + at + back_channel, s1 * (1.0 - b1 * b1), mask=inside)
    tl.store(grad_background + at + 2 * back_channel, s2 * (1.0 - b2 * b2), mask=inside)


def composite_fwd(head: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """(video, mask_mean float32 [B]); the video lies in memory as `head` does."""
    head, background = dense(head), dense(background)
    batch, _, frames, height, width = head.shape
    video, pixels = laid_out_as(head, 3), height * width
    parts = 1 if batch >= MANY_VIDEOS else min(4, max(1, frames))
    frames_each = triton.cdiv(frames, parts)
    blocks = triton.cdiv(pixels, PIXELS)
    mask_sums = torch.empty(batch, parts, blocks, dtype=torch.float32, device=head.device)
    if mask_sums.numel():
        last, back_last = is_channels_last(head), is_channels_last(background)
        with device_guard(head):
            _composite_fwd_kernel[(blocks, parts, batch)](
                head, background, video, mask_sums, frames, frames_each, pixels,
                frames * pixels, *((1, 3) if back_last else (pixels, 1)),
                *((1, 3) if last else (frames * pixels, 1)),
                PIXELS=PIXELS, CHANNELS_LAST=last, num_warps=WARPS,
            )  # fmt: skip
    return video, mask_sums.sum(dim=(1, 2)) / (frames * pixels)


def composite_bwd(
    head: Tensor, background: Tensor, grad_video: Tensor, grad_mask_mean: Tensor
) -> tuple[Tensor, Tensor]:
    """(grad_head, grad_background), laid out as `head` and `background`. `grad_video` may have any
    strides."""
    head, background = dense(head), dense(background)
    batch, _, frames, height, width = head.shape
    pixels = height * width
    if grad_video.stride(3) != width * grad_video.stride(4) or grad_video.stride(4) not in (0, 1, 3):
        grad_video = grad_video.contiguous()
    grad_head, grad_background = torch.empty_like(head), torch.empty_like(background)
    blocks = triton.cdiv(pixels, PIXELS)
    if batch * blocks:
        last, back_last = is_channels_last(head), is_channels_last(background)
        with device_guard(head):
            _composite_bwd_kernel[(blocks, batch)](
                head, background, grad_video, grad_mask_mean.contiguous(), grad_head, grad_background,
                frames, pixels, frames * pixels, *((1, 3) if back_last else (pixels, 1)),
                *grad_video.stride()[:3], grad_video.stride(4),
                PIXELS=PIXELS, CHANNELS_LAST=last, num_warps=WARPS,
            )  # fmt: skip
    return grad_head, grad_background
