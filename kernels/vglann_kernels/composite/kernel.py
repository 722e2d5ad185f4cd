"""`mask_composite` in Triton: a program owns a block of pixels of one video and loops over its frames.

The background is read once and, in the backward, its gradient is a sum the program keeps in registers: no
atomics. Nothing is saved between the passes but the inputs; activations are computed again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LAUNCH, dense, device_guard, is_channels_last, laid_out_as

# 4 pixels a thread: 8-byte loads of bfloat16.
PIXELS, WARPS = 512, 4
# From here on one program per pixel block fills the GPU; below, the forward splits T.
MANY_VIDEOS = 64


@triton.jit
def sigmoid(x):
    # exp may be infinite: the quotient is then 0, as it should be.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # The absolute error is under 2e-7.
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def load_head(frame_ptr, pixel, inside, channel_stride, CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr):
    """Load the four channels at `pixel` of one frame as float32; `frame_ptr` points at its first value."""
    if CHANNELS_LAST:
        # The four numbers of a pixel are neighbors: one wide load.
        channel = tl.arange(0, 4)[None, :]
        x = tl.load(frame_ptr + pixel[:, None] * 4 + channel, mask=inside[:, None], other=0.0)
        # Channels (0, 2) and (1, 3).
        even, odd = tl.split(tl.reshape(x, [PIXELS, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
    else:
        x0 = tl.load(frame_ptr + pixel, mask=inside, other=0.0)
        x1 = tl.load(frame_ptr + channel_stride + pixel, mask=inside, other=0.0)
        x2 = tl.load(frame_ptr + 2 * channel_stride + pixel, mask=inside, other=0.0)
        x3 = tl.load(frame_ptr + 3 * channel_stride + pixel, mask=inside, other=0.0)
    return x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)


@triton.jit
def store_head(frame_ptr, pixel, inside, channel_stride, x0, x1, x2, x3, CHANNELS_LAST: tl.constexpr):
    """Store what `load_head` loads, rounded to the dtype of `frame_ptr`."""
    if CHANNELS_LAST:
        # [PIXELS,2,2]
        x = tl.join(tl.join(x0, x2), tl.join(x1, x3))
        x = tl.reshape(x, [x0.shape[0], 4])
        channel = tl.arange(0, 4)[None, :]
        tl.store(frame_ptr + pixel[:, None] * 4 + channel, x, mask=inside[:, None])
    else:
        tl.store(frame_ptr + pixel, x0, mask=inside)
        tl.store(frame_ptr + channel_stride + pixel, x1, mask=inside)
        tl.store(frame_ptr + 2 * channel_stride + pixel, x2, mask=inside)
        tl.store(frame_ptr + 3 * channel_stride + pixel, x3, mask=inside)


@triton.jit
def _composite_fwd_kernel(
    head_ptr, background_ptr, video_ptr, mask_sums_ptr,
    frames, frames_each, pixels, head_channel_stride, back_channel_stride, back_pixel_stride,
    video_channel_stride, video_pixel_stride, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    # One float dtype: head [B,4,frames,pixels], background [B,3,pixels], video [B,3,frames,pixels].
    # float32: mask_sums [B,parts,blocks].
    block, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pixel = block * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    back_ptr = background_ptr + b * 3 * pixels + pixel * back_pixel_stride
    b0 = tanh(tl.load(back_ptr, mask=inside, other=0.0).to(tl.float32))
    b1 = tanh(tl.load(back_ptr + back_channel_stride, mask=inside, other=0.0).to(tl.float32))
    b2 = tanh(tl.load(back_ptr + 2 * back_channel_stride, mask=inside, other=0.0).to(tl.float32))
    total = tl.zeros([PIXELS], tl.float32)
    first = part * frames_each
    step = pixels * 4 if CHANNELS_LAST else pixels
    out_step = pixels * 3 if CHANNELS_LAST else pixels
    frame_ptr = head_ptr + b * 4 * pixels * frames + first * step
    out_ptr = video_ptr + b * 3 * pixels * frames + first * out_step
    for _ in range(tl.minimum(frames_each, frames - first)):
        f0, f1, f2, x3 = load_head(frame_ptr, pixel, inside, head_channel_stride, CHANNELS_LAST, PIXELS)
        m = sigmoid(x3)
        total += tl.where(inside, m, 0.0)
        place_ptr = out_ptr + pixel * video_pixel_stride
        tl.store(place_ptr, m * tanh(f0) + (1.0 - m) * b0, mask=inside)
        tl.store(place_ptr + video_channel_stride, m * tanh(f1) + (1.0 - m) * b1, mask=inside)
        tl.store(place_ptr + 2 * video_channel_stride, m * tanh(f2) + (1.0 - m) * b2, mask=inside)
        frame_ptr += step
        out_ptr += out_step
    place = (b * tl.num_programs(1) + part) * tl.num_programs(0) + block
    tl.store(mask_sums_ptr + place, tl.sum(total))


@triton.jit
def _composite_bwd_kernel(
    head_ptr, background_ptr, grad_video_ptr, grad_mask_mean_ptr, grad_head_ptr, grad_background_ptr,
    frames, pixels, head_channel_stride, back_channel_stride, back_pixel_stride,
    grad_b_stride, grad_c_stride, grad_t_stride, grad_pixel_stride,
    PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    # One float dtype: head, grad_head [B,4,frames,pixels]; background, grad_background [B,3,pixels];
    # grad_video [B,3,frames,pixels]. float32: grad_mask_mean [B].
    block, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pixel = block * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    back_offset = b * 3 * pixels + pixel * back_pixel_stride
    b0 = tanh(tl.load(background_ptr + back_offset, mask=inside, other=0.0).to(tl.float32))
    b1 = tanh(
        tl.load(background_ptr + back_offset + back_channel_stride, mask=inside, other=0.0).to(tl.float32)
    )
    b2 = tanh(
        tl.load(background_ptr + back_offset + 2 * back_channel_stride, mask=inside, other=0.0).to(tl.float32)
    )
    prior = 0.0
    if grad_mask_mean_ptr is not None:
        prior = tl.load(grad_mask_mean_ptr + b).to(tl.float32) / (frames * pixels)
    s0 = tl.zeros([PIXELS], tl.float32)
    s1 = tl.zeros([PIXELS], tl.float32)
    s2 = tl.zeros([PIXELS], tl.float32)
    step = pixels * 4 if CHANNELS_LAST else pixels
    frame_ptr = head_ptr + b * 4 * pixels * frames
    grad_frame_ptr = grad_head_ptr + b * 4 * pixels * frames
    upstream_offset = b * grad_b_stride
    for _ in range(frames):
        f0, f1, f2, x3 = load_head(frame_ptr, pixel, inside, head_channel_stride, CHANNELS_LAST, PIXELS)
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
        store_head(grad_frame_ptr, pixel, inside, head_channel_stride, h0, h1, h2, gm, CHANNELS_LAST)
        frame_ptr += step
        grad_frame_ptr += step
        upstream_offset += grad_t_stride
    if grad_video_ptr is not None:
        s0 *= 1.0 - b0 * b0
        s1 *= 1.0 - b1 * b1
        s2 *= 1.0 - b2 * b2
    tl.store(grad_background_ptr + back_offset, s0, mask=inside)
    tl.store(grad_background_ptr + back_offset + back_channel_stride, s1, mask=inside)
    tl.store(grad_background_ptr + back_offset + 2 * back_channel_stride, s2, mask=inside)


def composite_fwd(head: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Return (video, mask_mean float32 [B]). The video has the memory layout of `head`."""
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
                PIXELS=PIXELS, CHANNELS_LAST=last, num_warps=WARPS, **LAUNCH,
            )  # fmt: skip
    return video, mask_sums.sum(dim=(1, 2)) / (frames * pixels)


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
        if grad_video.stride(3) != width * grad_video.stride(4) or grad_video.stride(4) not in (0, 1, 3):
            grad_video = grad_video.contiguous()
        strides = (*grad_video.stride()[:3], grad_video.stride(4))
    if grad_mask_mean is not None:
        grad_mask_mean = grad_mask_mean.contiguous()
    grad_head, grad_background = torch.empty_like(head), torch.empty_like(background)
    blocks = triton.cdiv(pixels, PIXELS)
    if batch * blocks:
        last, back_last = is_channels_last(head), is_channels_last(background)
        with device_guard(head):
            _composite_bwd_kernel[(blocks, batch)](
                head, background, grad_video, grad_mask_mean, grad_head, grad_background,
                frames, pixels, frames * pixels, *((1, 3) if back_last else (pixels, 1)),
                *strides,
                PIXELS=PIXELS, CHANNELS_LAST=last, num_warps=WARPS, **LAUNCH,
            )  # fmt: skip
    return grad_head, grad_background
