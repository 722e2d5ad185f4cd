"""`composite_laplacian_loss` in Triton: one launch, two parts.

A program owns one color of one frame: it mixes the plane from the logits, subtracts the clip, and takes the
pyramid's loss and gradient on chip. The video is never written; the gradient by the video, g, is left in the
buffer of the logit gradients. The last program of a group (the three colors of GROUP frames, launched
together) to arrive finds the group's g in the L2 cache and turns it into the gradients of the logits: the
mask's is a sum over colors, the background's a sum over frames, kept in registers for a block of pixels and
written as one float32 partial per group. Which program comes last does not matter to the result, and partials
are summed in order: the outcome is the same from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..composite.kernel import load_head, sigmoid, store_head, sum_parts, tanh
from ..laplacian.pyramid import Pyramid
from ..launch import LAUNCH, dense, device_guard, is_channels_last, laid_out_as
from .matrices import PRESCALE, band_tables, kernel_options, plane_loss, warps

# Pixels of a block in the second part.
PIXELS = 512
# Frames of a group. The partials of the background's gradient take 3 * 4 / GROUP bytes per pixel and frame,
# when written and when read: at 4 frames 1.31 times the floor of the whole op, at 1 frame 2.24 times.
GROUP = 4


@triton.jit
def _score_plane(
    head_ptr, background_ptr, target_ptr, video_ptr, grad_head_ptr, loss_ptr, bands_ptr, weights,
    zero, index_error, target_low, target_scale, loss_unit, gradient_scale, scored,
    N: tl.constexpr, LEVELS: tl.constexpr, ADJOINT_PARTS: tl.constexpr, TAP_PARTS: tl.constexpr,
    SECOND: tl.constexpr, WITH_GRAD: tl.constexpr, WITH_VIDEO: tl.constexpr,
    WITH_L1: tl.constexpr, WITH_L2: tl.constexpr,
    HEAD_PIXEL: tl.constexpr, BACK_PIXEL: tl.constexpr, mask_channel_stride,
):  # fmt: skip
    """Score one color of one frame; its gradient by the video takes the place of the logit's gradient."""
    pixel = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    f = tanh(tl.load(head_ptr + pixel * HEAD_PIXEL).to(tl.float32))
    m = sigmoid(tl.load(head_ptr + mask_channel_stride + pixel * HEAD_PIXEL).to(tl.float32))
    b = tanh(tl.load(background_ptr + pixel * BACK_PIXEL).to(tl.float32))
    x = b + m * (f - b)
    if WITH_VIDEO:
        tl.store(video_ptr + pixel, x)
    if scored:
        y = tl.load(target_ptr + pixel).to(tl.float32)
        low = target_low * PRESCALE + index_error
        total, g = plane_loss(
            tl.fma(y, -target_scale * PRESCALE, x * PRESCALE - low),
            bands_ptr, weights, loss_unit, gradient_scale, zero,
            N, LEVELS, ADJOINT_PARTS, TAP_PARTS, SECOND, WITH_GRAD, WITH_L1, WITH_L2,
        )  # fmt: skip
        tl.store(loss_ptr, total)
        if WITH_GRAD:
            tl.store(grad_head_ptr + pixel * HEAD_PIXEL, g)


@triton.jit
def _finish_group(
    head_ptr, background_ptr, grad_head_ptr, back_partial_ptr, mask_mean_ptr,
    count, scored_frames, mask_share, head_channel_stride, back_channel_stride, prior,
    AREA: tl.constexpr, WITH_GRAD: tl.constexpr, HEAD_LAST: tl.constexpr, BACK_LAST: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """Turn g, in grad_head, into the gradients of `count` frames; store their masks' part of the video's mean."""
    HEAD_PIXEL: tl.constexpr = 4 if HEAD_LAST else 1
    BACK_PIXEL: tl.constexpr = 3 if BACK_LAST else 1
    total = tl.zeros([PIXELS], tl.float32)
    for block in range(AREA // PIXELS):
        pixel = block * PIXELS + tl.arange(0, PIXELS)
        if WITH_GRAD:
            back_ptr = background_ptr + pixel * BACK_PIXEL
            b0 = tanh(tl.load(back_ptr).to(tl.float32))
            b1 = tanh(tl.load(back_ptr + back_channel_stride).to(tl.float32))
            b2 = tanh(tl.load(back_ptr + 2 * back_channel_stride).to(tl.float32))
            s0 = tl.zeros([PIXELS], tl.float32)
            s1 = tl.zeros([PIXELS], tl.float32)
            s2 = tl.zeros([PIXELS], tl.float32)
        for t in range(count):
            frame = t * (AREA * HEAD_PIXEL)
            if WITH_GRAD:
                f0, f1, f2, x3 = load_head(
                    head_ptr + frame, block * PIXELS, AREA, head_channel_stride, HEAD_LAST, PIXELS
                )
                f0, f1, f2, m = tanh(f0), tanh(f1), tanh(f2), sigmoid(x3)
                scored = tl.where(t < scored_frames, AREA, 0)
                grad_ptr = grad_head_ptr + frame
                g0, g1, g2, _ = load_head(
                    grad_ptr, block * PIXELS, scored, head_channel_stride, HEAD_LAST, PIXELS
                )
                gm = g0 * (f0 - b0) + g1 * (f1 - b1) + g2 * (f2 - b2) + prior
                s0 += g0 * (1.0 - m)
                s1 += g1 * (1.0 - m)
                s2 += g2 * (1.0 - m)
                store_head(
                    grad_ptr, block * PIXELS, AREA, head_channel_stride,
                    g0 * m * (1.0 - f0 * f0), g1 * m * (1.0 - f1 * f1), g2 * m * (1.0 - f2 * f2),
                    gm * m * (1.0 - m), HEAD_LAST,
                )  # fmt: skip
            else:
                mask_ptr = head_ptr + frame + 3 * head_channel_stride
                m = sigmoid(tl.load(mask_ptr + pixel * HEAD_PIXEL).to(tl.float32))
            total += m
        if WITH_GRAD:
            tl.store(back_partial_ptr + pixel, s0 * (1.0 - b0 * b0))
            tl.store(back_partial_ptr + AREA + pixel, s1 * (1.0 - b1 * b1))
            tl.store(back_partial_ptr + 2 * AREA + pixel, s2 * (1.0 - b2 * b2))
    tl.store(mask_mean_ptr, tl.sum(total) * mask_share)


@triton.jit
def _composite_laplacian_kernel(
    head_ptr, background_ptr, clips_ptr, index_ptr, video_ptr, grad_head_ptr, back_partials_ptr,
    losses_ptr, mask_means_ptr, arrived_ptr, bands_ptr, weights, rows, total_frames, frames,
    head_channel_stride, back_channel_stride, target_low, target_scale, loss_unit, gradient_scale, prior, zero,
    GROUP: tl.constexpr, N: tl.constexpr, LEVELS: tl.constexpr, ADJOINT_PARTS: tl.constexpr,
    TAP_PARTS: tl.constexpr, SECOND: tl.constexpr, WITH_GRAD: tl.constexpr, WITH_VIDEO: tl.constexpr,
    WITH_L1: tl.constexpr, WITH_L2: tl.constexpr,
    HEAD_LAST: tl.constexpr, BACK_LAST: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    # One float dtype: head, grad_head [B,4,T,N,N]; background [B,3,N,N]; video [B,3,T,N,N], T = total_frames.
    # uint8: clips [rows,3,T,N,N]. int64: index [B]. float32: back_partials [B,groups,3,N,N],
    # losses [B,3,frames], mask_means [B,groups]. int32: arrived [B,groups]. float16: bands, see `band_tables`.
    HEAD_PIXEL: tl.constexpr = 4 if HEAD_LAST else 1
    BACK_PIXEL: tl.constexpr = 3 if BACK_LAST else 1
    AREA: tl.constexpr = N * N
    plane, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t, c = plane // 3, plane % 3
    head_ptr += b * 4 * AREA * total_frames
    grad_head_ptr += b * 4 * AREA * total_frames
    background_ptr += b * 3 * AREA
    if WITH_VIDEO or t < frames:
        row = tl.load(index_ptr + b)
        valid = (row >= 0) & (row < rows)
        place = t * (AREA * HEAD_PIXEL) + c * head_channel_stride
        _score_plane(
            head_ptr + place, background_ptr + c * back_channel_stride,
            clips_ptr + tl.where(valid, row, 0) * (3 * AREA) * total_frames + (c * total_frames + t) * AREA,
            video_ptr + b * 3 * AREA * total_frames + (c * total_frames + t) * AREA,
            grad_head_ptr + place, losses_ptr + (b * 3 + c) * frames + t, bands_ptr, weights, zero,
            # A bad row costs NaN, not a wild read.
            tl.where(valid, 0.0, float("nan")),
            target_low, target_scale, loss_unit, gradient_scale, t < frames,
            N, LEVELS, ADJOINT_PARTS, TAP_PARTS, SECOND, WITH_GRAD, WITH_VIDEO,
            WITH_L1, WITH_L2, HEAD_PIXEL, BACK_PIXEL, (3 - c) * head_channel_stride,
        )  # fmt: skip
    group = t // GROUP
    first = group * GROUP
    count = tl.minimum(GROUP, total_frames - first)
    groups = tl.cdiv(total_frames, GROUP)
    # Every thread's part of g is written before this program counts as arrived.
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + b * groups + group, 1) == 3 * count - 1:
        _finish_group(
            head_ptr + first * (AREA * HEAD_PIXEL), background_ptr, grad_head_ptr + first * (AREA * HEAD_PIXEL),
            back_partials_ptr + (b * groups + group) * 3 * AREA, mask_means_ptr + b * groups + group,
            count, frames - first, 1.0 / (total_frames * AREA), head_channel_stride, back_channel_stride, prior,
            AREA, WITH_GRAD, HEAD_LAST, BACK_LAST, PIXELS,
        )  # fmt: skip


def composite_laplacian_fwd(
    head: Tensor, background: Tensor, clips: Tensor, index: Tensor,
    frames: int, prior: float, options: Pyramid, gradient_scale: float, with_gradient: bool, with_video: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (losses float32 [B,3,frames], mask_means [B,groups], grad_head, grad_background, video).

    The mask means of a video's groups of frames sum to its mask mean.

    `prior` is the gradient of the loss by each value of the mask. Both gradients are multiplied by
    `gradient_scale` in place of one unit of the pyramid, `prior` is taken as it is. What is not asked for
    is empty. The gradients have the layouts of `head` and `background`; the video is contiguous.
    """
    head, background = dense(head), dense(background)
    clips, index = clips.contiguous(), index.contiguous()
    batch, _, total, size, _ = head.shape
    groups, area = triton.cdiv(total, GROUP), size * size
    grad_head = laid_out_as(head, 4) if with_gradient else head.new_empty(0)
    video = head.new_empty((batch, 3, total, size, size) if with_video else (0,))
    f32 = torch.float32
    partials = head.new_empty((batch, groups, 3, size, size) if with_gradient else (0,), dtype=f32)
    losses = head.new_empty(batch, 3, frames, dtype=f32)
    mask_means = head.new_empty(batch, groups, dtype=f32)
    arrived = torch.zeros(batch, groups, dtype=torch.int32, device=head.device)
    head_last, back_last = is_channels_last(head), is_channels_last(background)
    if batch and total:
        low, high = options.target_range
        weights, loss_unit = options.kernel_weights(size)
        with device_guard(head):
            _composite_laplacian_kernel[(3 * total, batch)](
                head, background, clips, index, video, grad_head, partials, losses, mask_means, arrived,
                band_tables(size, options, head.device), weights,
                clips.shape[0], total, frames,
                1 if head_last else total * area, 1 if back_last else area,
                low, (high - low) / 255, loss_unit, gradient_scale, prior, 0,
                GROUP=GROUP, N=size, WITH_GRAD=with_gradient, WITH_VIDEO=with_video,
                HEAD_LAST=head_last, BACK_LAST=back_last, PIXELS=PIXELS,
                num_warps=warps(size, options.blur), **kernel_options(options, head.dtype), **LAUNCH,
            )  # fmt: skip
    grad_background = sum_parts(partials, background) if with_gradient else head.new_empty(0)
    return losses, mask_means, grad_head, grad_background, video
