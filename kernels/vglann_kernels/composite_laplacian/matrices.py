"""The Laplacian pyramid of a plane by products with band matrices, on the matrix units.

Operands are float16, sums float32. Float32 values are split into two float16 parts, high and low, which keep 21 bits;
so are taps that float16 cannot hold. Planes of fewer than 16 rows are filtered in plain float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..laplacian.pyramid import Pyramid
from ..laplacian.reference import band_matrix, blur_taps

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
