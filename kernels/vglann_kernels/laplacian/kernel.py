"""`laplacian_pyramid_loss` in Triton: a program owns one plane, with all levels of its pyramid in registers.

One read of video and target gives the loss and, in the same pass, its gradient: the adjoint of the pyramid
applied to the signs of its bands. Level l contributes s_l = w_l sign(band_l) / n_l and
g_l = s_l - B^T (s_l - U g_{l+1}) B, with B the band matrix of the blur and U a quarter of the nearest
upsampling. All is float32. How a plane lies in the threads: see `stencil`.
"""

# A tuple that grows in a kernel changes its type.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LAUNCH, device_guard, processors
from .pyramid import Pyramid
from .reference import blur_taps
from .stencil import blurred, join_values, split_values, threads_of

SCALE_BLOCK = 4096
# A value of less than 1 / LARGE counts in proportion and not by its sign alone.
LARGE = tl.constexpr(1e25)


@triton.jit
def _absolute_sum(values, COUNT: tl.constexpr):
    total = tl.abs(values[0])
    for i in tl.static_range(1, COUNT):
        total += tl.abs(values[i])
    return total


@triton.jit
def _positive(x):
    """Return 0, 1/2 or 1 for a negative x, 0 and a positive x: one instruction, a saturating multiply-add."""
    return tl.clamp(tl.fma(x, LARGE, 0.5), 0.0, 1.0)


@triton.jit
def _tile_loss(
    p, threads, share, loss_weights, gradient_weights, LEVEL: tl.constexpr, LEVELS: tl.constexpr,
    T: tl.constexpr, STEP: tl.constexpr, SUM: tl.constexpr, WITH_GRAD: tl.constexpr,
):  # fmt: skip
    """Return (loss of each thread [G,G], gradient of the tile) of the pyramid from level LEVEL, the tile p, down.

    Calls itself for the next level, as the formula does. Sums of products times `share` are the blur. The next
    level is made of sums of four such sums, so that the values of level l are too large by (4 / share)^l.
    """
    COUNT: tl.constexpr = T * T
    loss_weight = loss_weights[LEVEL] * (1.0 / (STEP * STEP))
    # 2 * weight * _positive(x) - weight is weight * sign(x).
    weight = threads.zero + gradient_weights[LEVEL]
    if LEVEL == LEVELS:
        signs = ()
        for i in tl.static_range(COUNT):
            signs = signs + (tl.fma(_positive(p[i]), 2 * weight, -weight),)
        return loss_weight * _absolute_sum(p, COUNT), signs
    else:
        low = blurred(p, threads, T, STEP, SUM, False)
        band = ()
        for i in tl.static_range(COUNT):
            band = band + (tl.fma(low[i], -share, p[i]),)
        HALF: tl.constexpr = max(T // 2, 1)
        if T == 1:
            pair = low[0] + tl.gather(low[0], threads.row ^ STEP, 0)
            smaller = (pair + tl.gather(pair, threads.column ^ STEP, 1),)
        else:
            smaller = ()
            for r in tl.static_range(HALF):
                for c in tl.static_range(HALF):
                    upper = low[2 * r * T + 2 * c] + low[2 * r * T + 2 * c + 1]
                    lower = low[(2 * r + 1) * T + 2 * c] + low[(2 * r + 1) * T + 2 * c + 1]
                    smaller = smaller + (upper + lower,)
        loss, below = _tile_loss(
            smaller, threads, share, loss_weights, gradient_weights, LEVEL + 1, LEVELS,
            HALF, STEP * 2 if T == 1 else 1, SUM, WITH_GRAD,
        )  # fmt: skip
        loss += loss_weight * _absolute_sum(band, COUNT)
        gradient = band
        if WITH_GRAD:
            signs, inner = (), ()
            for i in tl.static_range(COUNT):
                signs = signs + (_positive(band[i]),)
            spread = ()
            for i in tl.static_range(HALF * HALF):
                spread = spread + (tl.fma(below[i], -0.25, -weight),)
            for r in tl.static_range(T):
                for c in tl.static_range(T):
                    inner = inner + (tl.fma(signs[r * T + c], 2 * weight, spread[(r // 2) * HALF + c // 2]),)
            adjoint = blurred(inner, threads, T, STEP, SUM, True)
            gradient = ()
            for i in tl.static_range(COUNT):
                gradient = gradient + (tl.fma(adjoint[i], -share, tl.fma(signs[i], 2 * weight, -weight)),)
        return loss, gradient


@triton.jit
def plane_loss(
    d, outer, middle, share, loss_weights, gradient_weights, zero, N: tl.constexpr, T: tl.constexpr,
    LEVELS: tl.constexpr, SUM: tl.constexpr, WITH_GRAD: tl.constexpr, WITH_L1: tl.constexpr, WITH_L2: tl.constexpr,
):  # fmt: skip
    """Return (loss, gradient [T,G,G,T]) of the difference d [T,G,G,T]: rows of a tile, tiles, columns of a tile.

    The weights come from `stencil_weights`. What is added to the pyramid's loss costs no other read of the planes.
    """
    G: tl.constexpr = N // T
    p = split_values(tl.reshape(tl.permute(d, (1, 2, 0, 3)), [G, G, T * T]), T * T)
    threads = threads_of(outer, middle, zero, G)
    share = threads.zero + share
    losses, tile = _tile_loss(
        p, threads, share, loss_weights, gradient_weights, 0, LEVELS, T, 1, SUM, WITH_GRAD
    )
    loss = tl.sum(losses)
    g = d
    if WITH_GRAD:
        g = tl.permute(tl.reshape(join_values(tile, 0, 1, T * T), [G, G, T, T]), (2, 0, 1, 3))
        # The sign of NaN is 0, as in the reference.
        g = tl.where(loss - loss == 0, g, 0.0)
    if WITH_L1:
        loss += loss_weights[LEVELS + 1] * tl.sum(tl.abs(d))
        if WITH_GRAD:
            weight = gradient_weights[LEVELS + 1]
            g += tl.where(d == d, tl.fma(_positive(d), 2 * weight, -weight), 0.0)
    if WITH_L2:
        loss += loss_weights[LEVELS + 2] * tl.sum(d * d)
        if WITH_GRAD:
            g += d * gradient_weights[LEVELS + 2]
    return loss, g


@triton.jit
def _offset(plane, n1, n2, s0_stride, s1_stride, s2_stride):
    """Return the offset of plane number `plane` of a [n0,n1,n2,H,W] tensor, int64."""
    return (plane // (n1 * n2)) * s0_stride + (plane // n2 % n1) * s1_stride + (plane % n2) * s2_stride


@triton.jit
def _laplacian_fwd_kernel(
    video_ptr, target_ptr, gradient_ptr, losses_ptr, outer, middle, share, loss_weights, gradient_weights, n1, n2,
    video_n0_stride, video_n1_stride, video_n2_stride,
    video_row_stride: tl.constexpr, video_column_stride: tl.constexpr,
    target_n0_stride, target_n1_stride, target_n2_stride,
    target_row_stride: tl.constexpr, target_column_stride: tl.constexpr,
    gradient_n0_stride, gradient_n1_stride, gradient_n2_stride,
    gradient_row_stride: tl.constexpr, gradient_column_stride: tl.constexpr,
    target_low, target_scale, zero,
    N: tl.constexpr, T: tl.constexpr, LEVELS: tl.constexpr, SUM: tl.constexpr,
    WITH_GRAD: tl.constexpr, WITH_L1: tl.constexpr, WITH_L2: tl.constexpr,
):  # fmt: skip
    # video, gradient [n0,n1,n2,N,N]: one float dtype. target [n0,n1,n2,N,N]: uint8 or float.
    # float32: losses [n0 * n1 * n2]. Tuples of floats: loss_weights, gradient_weights.
    G: tl.constexpr = N // T
    plane = tl.program_id(0).to(tl.int64)
    # [T,G,G,T]: a thread takes consecutive columns, neighboring threads neighboring tiles.
    row = tl.arange(0, T)[:, None, None, None] + T * tl.arange(0, G)[None, :, None, None]
    column = T * tl.arange(0, G)[None, None, :, None] + tl.arange(0, T)[None, None, None, :]
    video_ptr += _offset(plane, n1, n2, video_n0_stride, video_n1_stride, video_n2_stride)
    target_ptr += _offset(plane, n1, n2, target_n0_stride, target_n1_stride, target_n2_stride)
    x = tl.load(video_ptr + row * video_row_stride + column * video_column_stride).to(tl.float32)
    y = tl.load(target_ptr + row * target_row_stride + column * target_column_stride).to(tl.float32)
    loss, g = plane_loss(
        tl.fma(y, -target_scale, x - target_low), outer, middle, share, loss_weights, gradient_weights, zero,
        N, T, LEVELS, SUM, WITH_GRAD, WITH_L1, WITH_L2,
    )  # fmt: skip
    tl.store(losses_ptr + plane, loss)
    if WITH_GRAD:
        gradient_ptr += _offset(plane, n1, n2, gradient_n0_stride, gradient_n1_stride, gradient_n2_stride)
        tl.store(gradient_ptr + row * gradient_row_stride + column * gradient_column_stride, g)


@triton.jit
def _scale_values(values_ptr, scale, count, BLOCK: tl.constexpr):
    """Multiply `count` values in place; the programs take blocks in turn."""
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, tl.num_programs(0) * BLOCK):
        offset = start + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + offset, mask=offset < count, other=0.0).to(tl.float32)
        tl.store(values_ptr + offset, values * scale, mask=offset < count)


@triton.jit
def _scale_kernel(
    first_ptr, second_ptr, upstream_ptr, factor, first_count, second_count, BLOCK: tl.constexpr
):
    """Multiply two gradients in place by upstream * factor; nothing of them is touched where that is exactly 1."""
    # first [first_count], second [second_count], upstream []: float dtypes.
    scale = tl.load(upstream_ptr).to(tl.float32) * factor
    if scale != 1.0:
        _scale_values(first_ptr, scale, first_count, BLOCK)
        _scale_values(second_ptr, scale, second_count, BLOCK)


def stencil_taps(options: Pyramid) -> tuple[float, float, float]:
    """Return the outer and the middle tap divided by the tap at the center, and the share of a sum in the blur."""
    taps = blur_taps(options.blur, options.sigma)[0][0]
    total = sum(taps) / taps[2]
    # The kernel of the paper's code has the entries g_i + g_j: their sum is 2 * 5 * sum(g).
    share = 1 / (10 * total if options.blur == "paper" else total**2)
    return taps[0] / taps[2], taps[1] / taps[2], share


def stencil_weights(
    options: Pyramid, size: int, gradient_scale: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the weights of one value of each level, then of the plain and the squared difference.

    The first are those in the loss of a plane. The kernel's values of level l are too large by (4 / share)^l, and
    a plane of level l has 4^l times fewer. The second are those in the gradient, in units of 1 / `gradient_scale`.
    """
    share = stencil_taps(options)[2]
    levels = [weight * share**level for level, weight in enumerate(options.weights)]
    loss = tuple(weight / size**2 for weight in (*levels, options.l1_weight, options.l2_weight))
    *linear, squared = (weight * gradient_scale for weight in options.kernel_weights())
    return loss, (*linear, 2 * squared)


def tile_options(size: int, options: Pyramid) -> dict[str, int | bool]:
    """Return the compile-time choices of `plane_loss`, and the warps: one thread per tile."""
    tile = 4 if size == 32 else 8
    return {
        "T": tile,
        "LEVELS": options.levels,
        "SUM": options.blur == "paper",
        "WITH_L1": options.l1_weight != 0,
        "WITH_L2": options.l2_weight != 0,
        "num_warps": (size // tile) ** 2 // 32,
    }


def laplacian_fwd(
    video: Tensor,
    target: Tensor,
    options: Pyramid,
    gradient_scale: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return (loss of each plane float32 [...], gradient in units of 1 / `gradient_scale`, or empty without).

    Planes of any strides are read as they lie. Only planes that span more than 2^31 values are copied first.
    The gradient has the dtype and strides of a new `video`.
    """
    gradient = torch.empty_like(video) if with_gradient else video.new_empty(0)
    losses = torch.empty(video.shape[:-2], dtype=torch.float32, device=video.device)
    if losses.numel() == 0:
        return losses, gradient
    video, target = (x if _in_reach(x) else x.contiguous() for x in (video, target))
    views = [_five_dimensions(x) for x in (video, target, gradient if with_gradient else video)]
    n0, n1, n2, size, _ = views[0].shape
    low, high = options.target_range if target.dtype == torch.uint8 else (0.0, 255.0)
    loss_weights, gradient_weights = stencil_weights(options, size, gradient_scale)
    with device_guard(video):
        _laplacian_fwd_kernel[(n0 * n1 * n2,)](
            views[0], views[1], gradient, losses, *stencil_taps(options), loss_weights, gradient_weights,
            n1, n2, *views[0].stride(), *views[1].stride(), *views[2].stride(),
            low, (high - low) / 255, 0, N=size, WITH_GRAD=with_gradient,
            **tile_options(size, options), **LAUNCH,
        )  # fmt: skip
    return losses, gradient


def _in_reach(x: Tensor) -> bool:
    """Return True if the offsets within a plane of `x` [...,H,W] fit into 32 bits."""
    return (x.shape[-2] - 1) * x.stride(-2) + (x.shape[-1] - 1) * x.stride(-1) < 2**31


def _five_dimensions(x: Tensor) -> Tensor:
    """View [...,H,W] as [n0,n1,n2,H,W]; a view up to five dimensions, beyond that where strides allow."""
    if x.ndim > 5:
        return x.flatten(0, x.ndim - 5)
    return x[(None,) * (5 - x.ndim)]


def scale_gradients(gradients: list[Tensor], upstream: Tensor, factor: float) -> None:
    """Multiply one or two dense gradients [...,H,W] by upstream * factor in place; upstream is [] or [...].

    Where the product is 1 the one launch of a few programs moves no data.
    """
    if upstream.ndim > 0:
        for gradient in gradients:
            gradient.mul_((upstream * factor)[..., None, None])
        return
    first, second = gradients[0], gradients[-1]
    counts = (first.numel(), second.numel() if len(gradients) == 2 else 0)
    if max(counts) == 0:
        return
    programs = min(triton.cdiv(max(counts), SCALE_BLOCK), 4 * processors(first.device))
    with device_guard(first):
        _scale_kernel[(programs,)](
            first, second, upstream, factor, *counts, BLOCK=SCALE_BLOCK, num_warps=4, **LAUNCH
        )
