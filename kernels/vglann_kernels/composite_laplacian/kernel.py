"""`composite_laplacian_loss` in Triton: a program owns a few frames of a video, from the logits to the gradients.

Plane by plane, a color of a frame at a time, it mixes the video from the logits, subtracts the clip, and takes the
pyramid's loss and gradient in registers (see `laplacian.stencil`). The video is never written. The gradient by the
video, g, waits in the place of the logit's gradient until the program has all colors of its frames. Then the program
turns g into the gradients: the mask's is a sum over colors, the background's a sum over frames, which is stored as
one float32 partial. Until then the place of the partial holds the activated background, and a fourth plane the mask
of the current frame: both are made once and read for each color.

A second launch adds the partials, the losses and the masks in order: the outcome is the same from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..composite.kernel import background_strides, load_head, store_head
from ..laplacian.kernel import plane_loss, stencil_taps, stencil_weights, tile_options
from ..laplacian.pyramid import Pyramid
from ..launch import LAUNCH, dense, device_guard, is_channels_last, laid_out_as, processors

# Frames of a program at most. A partial of the background's gradient takes 12 bytes a pixel: with 4 frames that is
# 0.15 of what must be moved for them, and as much when it is read; with 1 frame 0.6.
MAX_FRAMES = 4
# Programs that a multiprocessor holds at once, with planes of 64 rows: these are filled first.
PROGRAMS = 4
SUM_BLOCK = 1024


@triton.jit
def _sigmoid(x):
    """Return 1 / (1 + exp(-x)): 5 instructions, where a quotient and `tl.exp` take 11.

    The power of 2 may be infinite: the root's inverse is then 0, as it should be.
    """
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _tanh(x):
    """Return 2 / (1 + exp(-2 x)) - 1 in 5 instructions; the absolute error is under 8e-7."""
    root = tl.rsqrt(tl.fma(tl.exp2(x * -2.8853900817779268), 0.5, 0.5))
    return tl.fma(root, root, -1.0)


@triton.jit
def _activate_background(
    background_ptr, channel_stride, activated_ptr,
    AREA: tl.constexpr, BACK_PIXEL: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Store the activated background, three planes."""
    for block in range(AREA // PIXELS):
        pixel = block * PIXELS + tl.arange(0, PIXELS)
        back_ptr = background_ptr + pixel * BACK_PIXEL
        b0 = tl.load(back_ptr).to(tl.float32)
        b1 = tl.load(back_ptr + channel_stride).to(tl.float32)
        b2 = tl.load(back_ptr + 2 * channel_stride).to(tl.float32)
        tl.store(activated_ptr + pixel, _tanh(b0))
        tl.store(activated_ptr + AREA + pixel, _tanh(b1))
        tl.store(activated_ptr + 2 * AREA + pixel, _tanh(b2))


@triton.jit
def _activate_mask(
    logit_ptr, activated_ptr, AREA: tl.constexpr, HEAD_PIXEL: tl.constexpr, PIXELS: tl.constexpr
):
    """Store the mask of a frame; return its sum."""
    total = tl.zeros([PIXELS], tl.float32)
    for block in range(AREA // PIXELS):
        pixel = block * PIXELS + tl.arange(0, PIXELS)
        m = _sigmoid(tl.load(logit_ptr + pixel * HEAD_PIXEL).to(tl.float32))
        tl.store(activated_ptr + pixel, m)
        total += m
    return tl.sum(total)


@triton.jit
def _score_plane(
    logit_ptr, back_ptr, mask_ptr, target_ptr, video_ptr, grad_ptr, loss_ptr,
    outer, middle, share, loss_weights, gradient_weights, low, scale, zero, scored,
    N: tl.constexpr, T: tl.constexpr, LEVELS: tl.constexpr, SUM: tl.constexpr, WITH_GRAD: tl.constexpr,
    WITH_L1: tl.constexpr, WITH_L2: tl.constexpr, WITH_VIDEO: tl.constexpr, HEAD_LAST: tl.constexpr,
):  # fmt: skip
    """Score one color of one frame; its gradient by the video takes the place of the logit's gradient."""
    G: tl.constexpr = N // T
    # [T,G,G,T]: rows of a tile, tiles, columns of a tile.
    row = tl.arange(0, T)[:, None, None, None] + T * tl.arange(0, G)[None, :, None, None]
    column = T * tl.arange(0, G)[None, None, :, None] + tl.arange(0, T)[None, None, None, :]
    place = row * N + column
    # Channels-last, a thread that reads its tile touches a line of memory of its own for every two pixels. So
    # neighboring threads read neighboring pixels, which then change threads.
    pixel = tl.arange(0, N * N) * 4
    if HEAD_LAST:
        f = tl.permute(tl.reshape(tl.load(logit_ptr + pixel), [G, T, G, T]), (1, 0, 2, 3))
    else:
        f = tl.load(logit_ptr + place)
    b = tl.load(back_ptr + place)
    x = b + tl.load(mask_ptr + place) * (_tanh(f.to(tl.float32)) - b)
    if WITH_VIDEO:
        tl.store(video_ptr + place, x)
    if scored:
        y = tl.load(target_ptr + place).to(tl.float32)
        loss, g = plane_loss(
            tl.fma(y, -scale, x - low), outer, middle, share, loss_weights, gradient_weights, zero,
            N, T, LEVELS, SUM, WITH_GRAD, WITH_L1, WITH_L2,
        )  # fmt: skip
        tl.store(loss_ptr, loss)
        if WITH_GRAD:
            rounded = g.to(grad_ptr.dtype.element_ty)
            if HEAD_LAST:
                tl.store(grad_ptr + pixel, tl.reshape(tl.permute(rounded, (1, 0, 2, 3)), [N * N]))
            else:
                tl.store(grad_ptr + place, rounded)


@triton.jit
def _finish_frames(
    head_ptr, activated_ptr, grad_head_ptr, count, scored_frames, channel_stride, prior,
    AREA: tl.constexpr, HEAD_LAST: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Turn g, in grad_head, into the gradients of `count` frames, and the background into its partial gradient."""
    for block in range(AREA // PIXELS):
        first = block * PIXELS
        pixel = first + tl.arange(0, PIXELS)
        b0 = tl.load(activated_ptr + pixel)
        b1 = tl.load(activated_ptr + AREA + pixel)
        b2 = tl.load(activated_ptr + 2 * AREA + pixel)
        s0 = tl.zeros([PIXELS], tl.float32)
        s1 = tl.zeros([PIXELS], tl.float32)
        s2 = tl.zeros([PIXELS], tl.float32)
        for t in range(count):
            frame = t * (AREA * (4 if HEAD_LAST else 1))
            grad_ptr = grad_head_ptr + frame
            # A frame that is not scored has g = 0.
            inside = tl.where(t < scored_frames, AREA, 0)
            g0, g1, g2, _ = load_head(grad_ptr, first, inside, channel_stride, HEAD_LAST, PIXELS)
            f0, f1, f2, x3 = load_head(head_ptr + frame, first, AREA, channel_stride, HEAD_LAST, PIXELS)
            f0, f1, f2, m = _tanh(f0), _tanh(f1), _tanh(f2), _sigmoid(x3)
            gm = g0 * (f0 - b0) + g1 * (f1 - b1) + g2 * (f2 - b2) + prior
            s0 += g0 * (1.0 - m)
            s1 += g1 * (1.0 - m)
            s2 += g2 * (1.0 - m)
            store_head(
                grad_ptr, first, AREA, channel_stride,
                g0 * m * (1.0 - f0 * f0), g1 * m * (1.0 - f1 * f1), g2 * m * (1.0 - f2 * f2),
                gm * m * (1.0 - m), HEAD_LAST,
            )  # fmt: skip
        tl.store(activated_ptr + pixel, s0 * (1.0 - b0 * b0))
        tl.store(activated_ptr + AREA + pixel, s1 * (1.0 - b1 * b1))
        tl.store(activated_ptr + 2 * AREA + pixel, s2 * (1.0 - b2 * b2))


@triton.jit
def _composite_laplacian_kernel(
    head_ptr, background_ptr, clips_ptr, index_ptr, video_ptr, grad_head_ptr, scratch_ptr,
    losses_ptr, mask_means_ptr, outer, middle, share, loss_weights, gradient_weights,
    rows, total_frames, frames, frames_each, head_channel_stride, back_channel_stride,
    target_low, target_scale, prior, zero,
    N: tl.constexpr, T: tl.constexpr, LEVELS: tl.constexpr, SUM: tl.constexpr, WITH_GRAD: tl.constexpr,
    WITH_L1: tl.constexpr, WITH_L2: tl.constexpr, WITH_VIDEO: tl.constexpr,
    HEAD_LAST: tl.constexpr, BACK_LAST: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    # One float dtype: head, grad_head [B,4,F,N,N]; background [B,3,N,N]; video [B,3,F,N,N], F = total_frames.
    # uint8: clips [rows,3,F,N,N]. int64: index [B]. float32: scratch [B,groups,4,N,N], losses [B,3,frames],
    # mask_means [B,groups]. Tuples of floats: loss_weights, gradient_weights.
    HEAD_PIXEL: tl.constexpr = 4 if HEAD_LAST else 1
    AREA: tl.constexpr = N * N
    group, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = group * frames_each
    count = tl.minimum(frames_each, total_frames - first)
    place = b * tl.num_programs(0) + group
    start = b * 4 * AREA * total_frames + first.to(tl.int64) * (AREA * HEAD_PIXEL)
    head_ptr += start
    grad_head_ptr += start
    activated_ptr = scratch_ptr + place * 4 * AREA
    mask_ptr = activated_ptr + 3 * AREA
    row = tl.load(index_ptr + b)
    valid = (row >= 0) & (row < rows)
    # A bad row costs NaN, not a wild read.
    low = target_low + tl.where(valid, 0.0, float("nan"))
    clips_ptr += tl.where(valid, row, 0) * (3 * AREA) * total_frames
    video_ptr += b * 3 * AREA * total_frames
    losses_ptr += b * 3 * frames
    _activate_background(
        background_ptr + b * 3 * AREA, back_channel_stride, activated_ptr, AREA, 3 if BACK_LAST else 1, PIXELS
    )
    total = 0.0
    for t in range(count):
        frame = t * (AREA * HEAD_PIXEL)
        logit_ptr = head_ptr + frame + 3 * head_channel_stride
        total += _activate_mask(logit_ptr, mask_ptr, AREA, HEAD_PIXEL, PIXELS)
        # What a thread has written others read.
        tl.debug_barrier()
        scored = first + t < frames
        if WITH_VIDEO or scored:
            for c in range(3):
                in_head = frame + c * head_channel_stride
                in_video = (c * total_frames + first + t) * AREA
                _score_plane(
                    head_ptr + in_head, activated_ptr + c * AREA, mask_ptr, clips_ptr + in_video,
                    video_ptr + in_video, grad_head_ptr + in_head, losses_ptr + c * frames + first + t,
                    outer, middle, share, loss_weights, gradient_weights, low, target_scale, zero, scored,
                    N, T, LEVELS, SUM, WITH_GRAD, WITH_L1, WITH_L2, WITH_VIDEO, HEAD_LAST,
                )  # fmt: skip
        tl.debug_barrier()
    tl.store(mask_means_ptr + place, total / (total_frames * AREA))
    if WITH_GRAD:
        _finish_frames(
            head_ptr, activated_ptr, grad_head_ptr, count, frames - first, head_channel_stride, prior,
            AREA, HEAD_LAST, PIXELS,
        )  # fmt: skip


@triton.jit
def _sums_kernel(
    scratch_ptr, losses_ptr, mask_means_ptr, grad_background_ptr, loss_ptr, parts, planes, masks,
    loss_share, mask_share, channel_stride, pixel_stride,
    AREA: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the partial gradients of a block of pixels; the first program adds losses and masks, too."""
    # float32: scratch [B,parts,4,AREA], losses [planes], mask_means [masks], loss []. Any float:
    # grad_background [B,3,AREA].
    block, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if WITH_GRAD:
        pixel = block * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        part_ptr = scratch_ptr + (b * parts * 4 + c) * AREA + pixel
        for _ in range(parts):
            total += tl.load(part_ptr)
            part_ptr += 4 * AREA
        tl.store(grad_background_ptr + b * 3 * AREA + c * channel_stride + pixel * pixel_stride, total)
    if block + c + b == 0:
        loss = loss_share * _sum(losses_ptr, planes, BLOCK)
        if mask_share != 0.0:
            loss += mask_share * _sum(mask_means_ptr, masks, BLOCK)
        tl.store(loss_ptr, loss)


@triton.jit
def _sum(values_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(values_ptr + place, mask=place < count, other=0.0)
    return tl.sum(total)


def frames_of_a_program(videos: int, frames: int, device: torch.device) -> int:
    """Return the frames each program takes: few where programs are too few for all multiprocessors."""
    return min(MAX_FRAMES, triton.cdiv(videos * frames, PROGRAMS * processors(device)))


def composite_laplacian_fwd(
    head: Tensor, background: Tensor, clips: Tensor, index: Tensor, frames: int, mask_weight: float,
    options: Pyramid, late: float, with_gradient: bool, with_video: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (loss, grad_head, grad_background, video); what is not asked for is empty.

    The loss is reduced as `options` say; with "none" it is [B,3,frames]. The gradients lack the factor `late`. They
    have the layouts of `head` and `background`; the video is contiguous.
    """
    head, background = dense(head), dense(background)
    clips, index = clips.contiguous(), index.contiguous()
    batch, _, total, size, _ = head.shape
    area = size * size
    frames_each = frames_of_a_program(batch, total, head.device)
    groups = triton.cdiv(total, frames_each) if batch else 0
    f32 = torch.float32
    grad_head = laid_out_as(head, 4) if with_gradient else head.new_empty(0)
    grad_background = torch.empty_like(background) if with_gradient else head.new_empty(0)
    video = head.new_empty((batch, 3, total, size, size) if with_video else (0,))
    scratch = head.new_empty(batch, groups, 4, area, dtype=f32)
    losses = head.new_empty(batch, 3, frames, dtype=f32)
    mask_means = head.new_empty(batch, groups, dtype=f32)
    if not batch:
        return options.reduced(losses), grad_head, grad_background, video
    videos = batch if options.reduction == "mean" else 1
    prior = mask_weight / (videos * total * area) / late
    unit = options.gradient_unit(size, batch * 3 * frames)
    loss_weights, gradient_weights = stencil_weights(options, size, unit / late)
    head_last, back_last = is_channels_last(head), is_channels_last(background)
    low, high = options.target_range
    tiles = tile_options(size, options)
    with device_guard(head):
        _composite_laplacian_kernel[(groups, batch)](
            head, background, clips, index, video, grad_head, scratch, losses, mask_means,
            *stencil_taps(options), loss_weights, gradient_weights,
            clips.shape[0], total, frames, frames_each, 1 if head_last else total * area,
            background_strides(background)[0], low, (high - low) / 255, prior, 0,
            N=size, WITH_GRAD=with_gradient, WITH_VIDEO=with_video, HEAD_LAST=head_last, BACK_LAST=back_last,
            PIXELS=128 * tiles["num_warps"], **tiles, **LAUNCH,
        )  # fmt: skip
        if options.reduction == "none":
            return losses, grad_head, grad_background, video
        loss = head.new_empty((), dtype=f32)
        _sums_kernel[(area // SUM_BLOCK, 3, batch) if with_gradient else (1,)](
            scratch, losses, mask_means, grad_background, loss, groups, losses.numel(), mask_means.numel(),
            1 / (losses.numel() if options.reduction == "mean" else 1), mask_weight / videos,
            *background_strides(background), AREA=area, WITH_GRAD=with_gradient, BLOCK=SUM_BLOCK, num_warps=4,
            **LAUNCH,
        )  # fmt: skip
    return loss, grad_head, grad_background, video
