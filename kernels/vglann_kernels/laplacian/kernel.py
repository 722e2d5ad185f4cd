"""`laplacian_pyramid_loss` in Triton: a program owns one plane, with all levels of its pyramid on chip.

One read of video and target gives the loss and, in the same pass, its gradient: the adjoint of the pyramid
applied to the signs of its bands. Level l contributes s_l = w_l sign(band_l) / n_l and
g_l = s_l - B^T (s_l - U g_{l+1}) B, with B the band matrix of the blur and U a quarter of the nearest
upsampling.

Products run on the matrix units with float16 operands and float32 sums. Float32 values are split into two
float16 parts, high and low, which keep 21 bits; so are taps that float16 cannot hold. Planes of fewer than 16
rows are filtered in plain float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LAUNCH, device_guard, processors
from .pyramid import Pyramid
from .reference import band_matrix, blur_taps

SCALE_BLOCK = 4096
# Differences are multiplied by this before they are split in float16 parts: up to 65504 / 16 they do not
# overflow, and down to 2^-29 they do not vanish.
PRESCALE = tl.constexpr(16.0)

# Tables in memory that no captured graph uses.
MAX_TABLES = 64
_tables: dict[tuple[int, int, str, float, torch.device], Tensor] = {}
_captured: set[tuple[int, int, str, float, torch.device]] = set()


@triton.jit
def _parts(x, PARTS: tl.constexpr):
    """Return (high, low) float16 parts of x; with PARTS == 1 x rounded, and a low part that nobody reads."""
    if PARTS == 2:
        # Cutting the last 13 bits off leaves a float32 that float16 holds: cheaper than rounding.
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        low = (x - high).to(tl.float16)
    else:
        high = x
        low = x.to(tl.float16)
    return high.to(tl.float16), low


@triton.jit
def _matrix(bands_ptr, N: tl.constexpr, PART: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Load matrix number PART of one level's table, [N,N] float16."""
    matrix = tl.load(bands_ptr + PART * N * N + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :])
    if TRANSPOSED:
        matrix = tl.trans(matrix)
    return matrix


@triton.jit
def _filtered(
    x, bands_ptr, zero, minus, N: tl.constexpr, HIGH: tl.constexpr, ADJOINT: tl.constexpr,
    PARTS: tl.constexpr, TAP_PARTS: tl.constexpr,
):  # fmt: skip
    """Return B x B^T - minus, or B^T x B - minus for ADJOINT; x [N,N] float32, B matrix HIGH of the table.

    PARTS and TAP_PARTS say in how many float16 parts x and B are used; the low part of B is matrix HIGH + 1.
    """
    right = _matrix(bands_ptr, N, HIGH, not ADJOINT)
    again = bands_ptr + zero
    # Fewer than 16 rows are too few for the matrix units.
    if N < 16:
        rows = right.to(tl.float32)
        columns = _matrix(again, N, HIGH, ADJOINT).to(tl.float32)
        if TAP_PARTS == 2:
            rows += _matrix(bands_ptr, N, HIGH + 1, not ADJOINT).to(tl.float32)
            columns += _matrix(again, N, HIGH + 1, ADJOINT).to(tl.float32)
        y = tl.sum(x[:, :, None] * rows[None, :, :], axis=1)
        z = tl.sum(columns[:, :, None] * y[None, :, :], axis=1) - minus
    else:
        x_high, x_low = _parts(x, PARTS)
        y = tl.dot(x_high, right)
        if PARTS == 2:
            y = tl.dot(x_low, right, y)
        if TAP_PARTS == 2:
            y = tl.dot(x_high, _matrix(bands_ptr, N, HIGH + 1, not ADJOINT), y)
        y_high, y_low = _parts(y, PARTS)
        left = _matrix(again, N, HIGH, ADJOINT)
        z = tl.dot(left, y_high)
        if PARTS == 2:
            z = tl.dot(left, y_low, z)
        if TAP_PARTS == 2:
            z = tl.dot(_matrix(again, N, HIGH + 1, ADJOINT), y_high, z)
        z -= minus
    return z


@triton.jit
def _blurred(
    x, bands_ptr, zero, N: tl.constexpr, ADJOINT: tl.constexpr, PARTS: tl.constexpr,
    TAP_PARTS: tl.constexpr, SECOND: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Return the blur of a plane, or its adjoint. `bands_ptr` holds four [N,N]: high and low part of B, then of Q.

    The paper's kernel has rank two: B x B^T - Q x Q^T. The taps of Q are small and sum to 0: except for
    float32 one part is enough (EXACT). `zero` is 0, unknown when compiling: matrices are loaded again for
    each product, from L1, so that they do not sit in registers in between.
    """
    minus = tl.zeros([N, N], tl.float32)
    if SECOND:
        PARTS_OF_Q: tl.constexpr = PARTS if EXACT else 1
        minus = _filtered(x, bands_ptr, zero, minus, N, 2, ADJOINT, PARTS_OF_Q, PARTS_OF_Q)
    return _filtered(x, bands_ptr, zero, minus, N, 0, ADJOINT, PARTS, TAP_PARTS)


@triton.jit
def _sign(x):
    # The sign bit of x on a 1: fewer instructions than two comparisons.
    signed = ((x.to(tl.int32, bitcast=True) & -2147483648) | 0x3F800000).to(tl.float32, bitcast=True)
    return tl.where(x == 0, 0.0, signed)


@triton.jit
def pyramid_l1(
    plane, bands_ptr, weights, zero, LEVEL: tl.constexpr, LEVELS: tl.constexpr, N: tl.constexpr,
    ADJOINT_PARTS: tl.constexpr, TAP_PARTS: tl.constexpr, SECOND: tl.constexpr, WITH_GRAD: tl.constexpr,
):  # fmt: skip
    """Return (loss, gradient [N,N]) of the pyramid from `plane` [N,N] at LEVEL down to the residual.

    weights: a tuple that starts with LEVELS + 1 values w_l 4^l / unit, see `Pyramid.kernel_weights`. Loss and
    gradient are in this unit. Calls itself for the next level, as the formula does. `zero`: see `_blurred`.
    """
    weight = weights[LEVEL]
    if LEVEL == LEVELS:
        loss = weight * tl.sum(tl.abs(plane))
        gradient = weight * _sign(plane)
    else:
        EXACT: tl.constexpr = ADJOINT_PARTS == 2
        low = _blurred(plane, bands_ptr, zero, N, False, 2, TAP_PARTS, SECOND, EXACT)
        band = plane - low
        # Half the registers until it is used.
        sign = _sign(band).to(tl.float16)
        HALF: tl.constexpr = N // 2
        # [HALF,HALF]
        smaller = tl.sum(tl.sum(tl.reshape(low, [HALF, 2, HALF, 2]), axis=3), axis=1) * 0.25
        loss, below = pyramid_l1(
            smaller, bands_ptr + 4 * N * N, weights, zero, LEVEL + 1, LEVELS, HALF,
            ADJOINT_PARTS, TAP_PARTS, SECOND, WITH_GRAD,
        )  # fmt: skip
        loss += weight * tl.sum(tl.abs(band))
        gradient = band
        if WITH_GRAD:
            spread = tl.broadcast_to((0.25 * below)[:, None, :, None], [HALF, 2, HALF, 2])
            s = weight * sign.to(tl.float32)
            inner = s - tl.reshape(spread, [N, N])
            # Signs rounded to one part need taps no finer than that.
            ADJOINT_TAP_PARTS: tl.constexpr = TAP_PARTS if EXACT else 1
            adjoint = _blurred(
                inner, bands_ptr + 2 * zero, zero, N, True, ADJOINT_PARTS, ADJOINT_TAP_PARTS, SECOND, EXACT
            )
            gradient = s - adjoint
    return loss, gradient


@triton.jit
def plane_loss(
    x, bands_ptr, weights, loss_unit, gradient_scale, zero, N: tl.constexpr, LEVELS: tl.constexpr,
    ADJOINT_PARTS: tl.constexpr, TAP_PARTS: tl.constexpr, SECOND: tl.constexpr, WITH_GRAD: tl.constexpr,
    WITH_L1: tl.constexpr, WITH_L2: tl.constexpr,
):  # fmt: skip
    """Return (loss, gradient [N,N] times gradient_scale) of the difference x [N,N], which comes times PRESCALE.

    weights: see `Pyramid.kernel_weights`. What is added to the pyramid's loss costs no other read of the planes.
    """
    loss, g = pyramid_l1(
        x, bands_ptr, weights, zero, 0, LEVELS, N, ADJOINT_PARTS, TAP_PARTS, SECOND, WITH_GRAD
    )
    # The sign of NaN is 0, as in the reference.
    g *= tl.where(loss - loss == 0, gradient_scale, 0.0)
    if WITH_L1:
        loss += weights[LEVELS + 1] * tl.sum(tl.abs(x))
        g += tl.where(x == x, _sign(x), 0.0) * (weights[LEVELS + 1] * gradient_scale)
    if WITH_L2:
        loss += weights[LEVELS + 2] * (tl.sum(x * x) / PRESCALE)
        g += x * (weights[LEVELS + 2] * gradient_scale * (2.0 / PRESCALE))
    return loss * (loss_unit / PRESCALE), g


@triton.jit
def _offset(plane, n1, n2, s0_stride, s1_stride, s2_stride):
    """Return the offset of plane number `plane` of a [n0,n1,n2,H,W] tensor, int64."""
    return (plane // (n1 * n2)) * s0_stride + (plane // n2 % n1) * s1_stride + (plane % n2) * s2_stride


@triton.jit
def _laplacian_fwd_kernel(
    video_ptr, target_ptr, gradient_ptr, losses_ptr, bands_ptr, weights, n1, n2,
    video_n0_stride, video_n1_stride, video_n2_stride,
    video_row_stride: tl.constexpr, video_column_stride: tl.constexpr,
    target_n0_stride, target_n1_stride, target_n2_stride,
    target_row_stride: tl.constexpr, target_column_stride: tl.constexpr,
    gradient_n0_stride, gradient_n1_stride, gradient_n2_stride,
    gradient_row_stride: tl.constexpr, gradient_column_stride: tl.constexpr,
    target_low, target_scale, loss_unit, gradient_scale, zero,
    N: tl.constexpr, LEVELS: tl.constexpr, ADJOINT_PARTS: tl.constexpr, TAP_PARTS: tl.constexpr,
    SECOND: tl.constexpr, WITH_GRAD: tl.constexpr, WITH_L1: tl.constexpr, WITH_L2: tl.constexpr,
):  # fmt: skip
    # video, gradient [n0,n1,n2,N,N]: one float dtype. target [n0,n1,n2,N,N]: uint8 or float.
    # float32: losses [n0 * n1 * n2]. float16: bands, see `band_tables`.
    plane = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    video_ptr += _offset(plane, n1, n2, video_n0_stride, video_n1_stride, video_n2_stride)
    target_ptr += _offset(plane, n1, n2, target_n0_stride, target_n1_stride, target_n2_stride)
    x = tl.load(video_ptr + row * video_row_stride + column * video_column_stride).to(tl.float32)
    y = tl.load(target_ptr + row * target_row_stride + column * target_column_stride).to(tl.float32)
    # Still 0; as a product it also keeps addresses out of registers (sm_86, sm_120).
    zero = (plane * zero).to(tl.int32)
    loss, g = plane_loss(
        tl.fma(y, -target_scale * PRESCALE, x * PRESCALE - target_low * PRESCALE),
        bands_ptr, weights, loss_unit, gradient_scale, zero,
        N, LEVELS, ADJOINT_PARTS, TAP_PARTS, SECOND, WITH_GRAD, WITH_L1, WITH_L2,
    )  # fmt: skip
    tl.store(losses_ptr + plane, loss)
    if WITH_GRAD:
        gradient_ptr += _offset(plane, n1, n2, gradient_n0_stride, gradient_n1_stride, gradient_n2_stride)
        # Indices, too, are made again rather than kept.
        row += zero
        column += zero
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


def band_tables(size: int, options: Pyramid, device: torch.device) -> Tensor:
    """Return level by level four [n,n] float16 matrices: high and low part of B, then of Q of the paper's kernel.

    Tables are kept. A CUDA graph holds a pointer into its table, so a table that was asked for while a graph was
    captured is kept for ever (43 KB for planes of 64 rows). A table first made in a capture belongs to that graph.
    """
    key = (size, options.levels, options.blur, options.sigma, device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if key not in _tables:
        table = _new_band_tables(*key)
        if capturing:
            return table
        kept = [name for name in _tables if name not in _captured]
        if len(kept) >= MAX_TABLES:
            del _tables[kept[0]]
        _tables[key] = table
    if capturing:
        _captured.add(key)
    return _tables[key]


def _new_band_tables(size: int, levels: int, blur: str, sigma: float, device: torch.device) -> Tensor:
    """Make the tables on the device: a copy from the host would wait for it and cannot be captured.

    B G B^T - Q G Q^T is the blur of the reference. The paper's (g, box / 2) + (box / 2, g) is (p, p) - (q, q)
    with p = (g + box) / 2 and q = (g - box) / 2, whose taps sum to 0.
    """
    terms = blur_taps(blur, sigma)
    first, second = terms[0][0], [0.0] * 5
    if blur == "paper":
        g, half_box = terms[0]
        first = [a / 2 + b for a, b in zip(g, half_box, strict=True)]
        second = [a / 2 - b for a, b in zip(g, half_box, strict=True)]
    like = torch.empty(0, dtype=torch.float64, device=device)
    parts = []
    for level in range(levels):
        for taps in (first, second):
            matrix = band_matrix(size >> level, taps, like)
            parts += [matrix.half(), (matrix - matrix.half().double()).half()]
    return torch.cat([part.flatten() for part in parts])


def warps(size: int, blur: str) -> int:
    """Return the warps per program for planes of `size` rows; the paper's two products need more registers.

    Planes of 128 rows spill whatever the number; with 8 warps the assembler also takes minutes.
    """
    if size > 64:
        return 16
    return 8 if blur == "paper" else 4


def kernel_options(options: Pyramid, dtype: torch.dtype) -> dict[str, int | bool]:
    """Return the compile-time choices of `plane_loss` for the options and the dtype of the gradient."""
    return {
        "ADJOINT_PARTS": 1 if dtype == torch.bfloat16 else 2,
        "TAP_PARTS": 1 if options.blur == "binomial" else 2,
        "SECOND": options.blur == "paper",
        "LEVELS": options.levels,
        "WITH_L1": options.l1_weight != 0,
        "WITH_L2": options.l2_weight != 0,
    }


def laplacian_fwd(
    video: Tensor,
    target: Tensor,
    options: Pyramid,
    gradient_scale: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return (loss of each plane float32 [...], gradient in units of 1 / `gradient_scale`, or empty without).

    Planes of any strides are read as they lie. The gradient has the dtype and strides of a new `video`.
    """
    gradient = torch.empty_like(video) if with_gradient else video.new_empty(0)
    losses = torch.empty(video.shape[:-2], dtype=torch.float32, device=video.device)
    if losses.numel() == 0:
        return losses, gradient
    views = [_five_dimensions(x) for x in (video, target, gradient if with_gradient else video)]
    n0, n1, n2, size, _ = views[0].shape
    low, high = options.target_range if target.dtype == torch.uint8 else (0.0, 255.0)
    weights, loss_unit = options.kernel_weights(size)
    with device_guard(video):
        _laplacian_fwd_kernel[(n0 * n1 * n2,)](
            views[0], views[1], gradient, losses,
            band_tables(size, options, video.device), weights,
            n1, n2, *views[0].stride(), *views[1].stride(), *views[2].stride(),
            low, (high - low) / 255, loss_unit, gradient_scale, 0,
            N=size, WITH_GRAD=with_gradient, num_warps=warps(size, options.blur),
            **kernel_options(options, video.dtype), **LAUNCH,
        )  # fmt: skip
    return losses, gradient


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
