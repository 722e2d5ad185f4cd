"""`composite_laplacian_loss` in Triton: one launch, two parts.

A program owns one colour of one frame: it mixes the plane from the logits, subtracts the clip, and takes the
pyramid's loss and gradient on chip. The video is never written; the gradient by the video, g, is left in the
buffer of the logit gradients. The last program of a group (the three colours of GROUP frames, launched
together) to arrive finds the group's g in the L2 cache and turns it into the gradients of the logits: the
mask's is a sum over colours, the background's a sum over frames, kept in registers for a block of pixels and
written as one float32 partial per group. Which program comes last does not matter to the result, and partials
are summed in order: the outcome is the same from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..composite.kernel import load_head, sigmoid, store_head, tanh
from ..laplacian.kernel import PRESCALE, band_tables, kernel_options, pyramid_l1, warps, weight_table
from ..launch import dense, device_guard, is_channels_last, laid_out_as

PIXELS = 512  # of a block in the second part
# Frames of a group. The partials of the background's gradient take 3 * 4 / GROUP bytes per pixel and frame,
# as written and as read again: at 4 frames 1.31 times the floor of the whole op, at 1 frame 2.24 times.
GROUP = 4


@triton.jit
def _score_plane(
    head, background, target, video, grad_head, loss, bands, weights, zero, index_error,
    target_low, target_scale, gradient_scale, scored,
    N: tl.constexpr, LEVELS: tl.constexpr, ADJOINT_PARTS: tl.constexpr, TAP_PARTS: tl.constexpr,
    SECOND: tl.constexpr, WITH_GRAD: tl.constexpr, WITH_VIDEO: tl.constexpr,
    HEAD_PIXEL: tl.constexpr, BACK_PIXEL: tl.constexpr, VIDEO_PIXEL: tl.constexpr, mask_plane,
):  # fmt: skip
    """One colour of one frame: its loss, and the gradient by the video into the place of the logit's."""
    pixel = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    f = tanh(tl.load(head + pixel * HEAD_PIXEL).to(tl.float32))
    m = sigmoid(tl.load(head + mask_plane + pixel * HEAD_PIXEL).to(tl.float32))
    b = tanh(tl.load(background + pixel * BACK_PIXEL).to(tl.float32))
    x = b + m * (f - b)
    if WITH_VIDEO:
        tl.store(video + pixel * VIDEO_PIXEL, x)
    if scored:
        y = tl.load(target + pixel).to(tl.float32)
        low = target_low * PRESCALE + index_error
        total, g = pyramid_l1(
            tl.fma(y, -target_scale * PRESCALE, x * PRESCALE - low),
            bands, weights, zero, 0, LEVELS, N, ADJOINT_PARTS, TAP_PARTS, SECOND, WITH_GRAD,
        )  # fmt: skip
        total = total / PRESCALE
        tl.store(loss, total)
        if WITH_GRAD:
            g *= tl.where(total - total == 0, gradient_scale, 0.0)  # the sign of NaN is 0
            tl.store(grad_head + pixel * HEAD_PIXEL, g)


@triton.jit
def _finish_group(
    head, background, grad_head, back_partial, mask_sum, count, scored_frames, head_channel, back_channel,
    prior, AREA: tl.constexpr, WITH_GRAD: tl.constexpr, HEAD_LAST: tl.constexpr, BACK_LAST: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """From g, in `grad_head`, to the gradients of `count` frames; and the sum of their masks."""
    HEAD_PIXEL: tl.constexpr = 4 if HEAD_LAST else 1
    BACK_PIXEL: tl.constexpr = 3 if BACK_LAST else 1
    total = tl.zeros([PIXELS], tl.float32)
    for block in range(AREA // PIXELS):
        pixel = block * PIXELS + tl.arange(0, PIXELS)
        everywhere = pixel < AREA
        if WITH_GRAD:
            at = background + pixel * BACK_PIXEL
            b0 = tanh(tl.load(at).to(tl.float32))
            b1 = tanh(tl.load(at + back_channel).to(tl.float32))
            b2 = tanh(tl.load(at + 2 * back_channel).to(tl.float32))
            s0 = tl.zeros([PIXELS], tl.float32)
            s1 = tl.zeros([PIXELS], tl.float32)
            s2 = tl.zeros([PIXELS], tl.float32)
        for t in range(count):
            frame = t * (AREA * HEAD_PIXEL)
            if WITH_GRAD:
                f0, f1, f2, x3 = load_head(head + frame, pixel, everywhere, head_channel, HEAD_LAST, PIXELS)
                f0, f1, f2, m = tanh(f0), tanh(f1), tanh(f2), sigmoid(x3)
                scored = pixel < tl.where(t < scored_frames, AREA, 0)
                place = grad_head + frame
                g0, g1, g2, _ = load_head(place, pixel, scored, head_channel, HEAD_LAST, PIXELS)
                gm = g0 * (f0 - b0) + g1 * (f1 - b1) + g2 * (f2 - b2) + prior
                s0 += g0 * (1.0 - m)
                s1 += g1 * (1.0 - m)
                s2 += g2 * (1.0 - m)
                store_head(
                    place, pixel, everywhere, head_channel,
                    g0 * m * (1.0 - f0 * f0), g1 * m * (1.0 - f1 * f1), g2 * m * (1.0 - f2 * f2),
                    gm * m * (1.0 - m), HEAD_LAST,
                )  # fmt: skip
            else:
                m = sigmoid(tl.load(head + frame + 3 * head_channel + pixel * HEAD_PIXEL).to(tl.float32))
            total += m
        if WITH_GRAD:
            tl.store(back_partial + pixel, s0 * (1.0 - b0 * b0))
            tl.store(back_partial + AREA + pixel, s1 * (1.0 - b1 * b1))
            tl.store(back_partial + 2 * AREA + pixel, s2 * (1.0 - b2 * b2))
    tl.store(mask_sum, tl.sum(total))


@triton.jit
def _composite_laplacian_kernel(
    head, background, clips, index, video, grad_head, back_partials, losses, mask_sums, arrived,
    bands, weights, rows, total_frames, frames, head_channel, back_channel, video_channel,
    target_low, target_scale, gradient_scale, prior, zero,
    GROUP: tl.constexpr, N: tl.constexpr, LEVELS: tl.constexpr, ADJOINT_PARTS: tl.constexpr,
    TAP_PARTS: tl.constexpr, SECOND: tl.constexpr, WITH_GRAD: tl.constexpr, WITH_VIDEO: tl.constexpr,
    HEAD_LAST: tl.constexpr, BACK_LAST: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    HEAD_PIXEL: tl.constexpr = 4 if HEAD_LAST else 1
    BACK_PIXEL: tl.constexpr = 3 if BACK_LAST else 1
    VIDEO_PIXEL: tl.constexpr = 3 if HEAD_LAST else 1
    AREA: tl.constexpr = N * N
    plane, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t, c = plane // 3, plane % 3
    head += b * 4 * AREA * total_frames
    grad_head += b * 4 * AREA * total_frames
    background += b * 3 * AREA
    if WITH_VIDEO or t < frames:
        row = tl.load(index + b)
        valid = (row >= 0) & (row < rows)
        place = t * (AREA * HEAD_PIXEL) + c * head_channel
        _score_plane(
            head + place, background + c * back_channel,
            clips + tl.where(valid, row, 0) * (3 * AREA) * total_frames + (c * total_frames + t) * AREA,
            video + b * 3 * AREA * total_frames + t * (AREA * VIDEO_PIXEL) + c * video_channel,
            grad_head + place, losses + (b * 3 + c) * frames + t, bands, weights, zero,
            tl.where(valid, 0.0, float("nan")),  # a bad row costs NaN, not a wild read
            target_low, target_scale, gradient_scale, t < frames,
            N, LEVELS, ADJOINT_PARTS, TAP_PARTS, SECOND, WITH_GRAD, WITH_VIDEO,
            HEAD_PIXEL, BACK_PIXEL, VIDEO_PIXEL, (3 - c) * head_channel,
        )  # fmt: skip
    group = t // GROUP
    first = group * GROUP
    count = tl.minimum(GROUP, total_frames - first)
    groups = tl.cdiv(total_frames, GROUP)
    tl.debug_barrier()  # every thread's part of g is written before this program counts as arrived
    if tl.atomic_add(arrived + b * groups + group, 1) == 3 * count - 1:
        _finish_group(
            head + first * (AREA * HEAD_PIXEL), background, grad_head + first * (AREA * HEAD_PIXEL),
            back_partials + (b * groups + group) * 3 * AREA, mask_sums + b * groups + group,
            count, frames - first, head_channel, back_channel, prior,
            AREA, WITH_GRAD, HEAD_LAST, BACK_LAST, PIXELS,
        )  # fmt: skip


def composite_laplacian_fwd(
    head: Tensor, background: Tensor, clips: Tensor, index: Tensor,
    frames: int, prior: float, levels: int, blur: str, sigma: float, weights: tuple[float, ...],
    target_range: tuple[float, float], gradient_scale: float, with_gradient: bool, with_video: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(losses float32 [B,3,frames], mask_mean [B], grad_head, grad_background, video).

    `prior` is the gradient of the loss by each value of the mask. Both gradients are multiplied by
    `gradient_scale` in place of one unit of the pyramid, `prior` is taken as it is. What is not asked for
    comes back empty. The gradients and the video lie in memory as `head` and `background` do.
    """
    head, background = dense(head), dense(background)
    clips, index = clips.contiguous(), index.contiguous()
    batch, _, total, size, _ = head.shape
    groups, area = triton.cdiv(total, GROUP), size * size
    grad_head = laid_out_as(head, 4) if with_gradient else head.new_empty(0)
    video = laid_out_as(head, 3) if with_video else head.new_empty(0)
    f32 = torch.float32
    partials = head.new_empty((batch, groups, 3, size, size) if with_gradient else (0,), dtype=f32)
    losses = head.new_empty(batch, 3, frames, dtype=f32)
    mask_sums = head.new_empty(batch, groups, dtype=f32)
    arrived = torch.zeros(batch, groups, dtype=torch.int32, device=head.device)
    head_last, back_last = is_channels_last(head), is_channels_last(background)
    if batch and total:
        low, high = target_range
        with device_guard(head):
            _composite_laplacian_kernel[(3 * total, batch)](
                head, background, clips, index, video, grad_head, partials, losses, mask_sums, arrived,
                band_tables(size, levels, blur, sigma, head.device),
                weight_table(size, weights, head.device)[0],
                clips.shape[0], total, frames,
                1 if head_last else total * area, 1 if back_last else area,
                1 if head_last else total * area,
                low, (high - low) / 255, gradient_scale, prior, 0,
                GROUP=GROUP, N=size, LEVELS=levels, WITH_GRAD=with_gradient, WITH_VIDEO=with_video,
                HEAD_LAST=head_last, BACK_LAST=back_last, PIXELS=PIXELS,
                num_warps=warps(size, blur), **kernel_options(blur, head.dtype),
            )  # fmt: skip
    grad_background = head.new_empty(0)
    if with_gradient:
        grad_background = torch.empty_like(background).copy_(partials.sum(dim=1))
    return losses, mask_sums.sum(dim=1) / (total * area), grad_head, grad_background, video
