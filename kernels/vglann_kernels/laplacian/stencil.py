"""Blurs of a plane in registers: no tables in memory, no matrix units.

A thread owns a tile of T x T values of the plane, and of level l of its pyramid a tile of (T >> l) x (T >> l)
values. Pooling and its adjoint never leave the thread; only the two rows and two columns beside a tile come from
other threads. In the code a tile is a tuple of T * T tensors [G,G], one value of each of the G x G threads: the value
in row r and column c of the tile is number r * T + c. Once a tile is one value, STEP x STEP threads hold the same
value of a coarser level.

Taps are symmetric and given as (outer, middle), divided by the tap at the center. Edge values are replicated, so
along an axis the blur is a matrix B whose first rows are

    1 + middle + outer   middle   outer
    middle + outer       1        middle   outer
    outer                middle   1        middle   outer

and whose last rows mirror them. A thread at an edge has other factors and takes nothing from beyond it. B^T differs
from B in the two values beside the corner only. What is returned is not divided by the sum of the taps.
"""

# A tuple that grows in a kernel changes its type.
# mypy: disable-error-code="assignment, misc"

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Edge(NamedTuple):
    """The factors [G,G] at one end of a tile's row or column, which may be the edge of the plane.

    Of the second value beyond the end, the first one, the end itself, and the value beside the corner of B.
    """

    far: Any
    near: Any
    end: Any
    corner: Any


class Filter(NamedTuple):
    """Taps along an axis, and the factors at both ends of a tile."""

    outer: Any
    middle: Any
    low: Edge
    high: Edge


class Threads(NamedTuple):
    """Row and column [G,G] of each thread, a zero, and the filters down the columns and along the rows.

    `zero` is unknown when compiling. A value of the launch to which it is added becomes a value of the threads:
    otherwise sm_90 loads it again for each product, a seventh of all instructions.
    """

    row: Any
    column: Any
    zero: Any
    down: Filter
    along: Filter
    box_down: Filter
    box_along: Filter


@triton.jit
def split_values(x, COUNT: tl.constexpr):
    """Return the COUNT values along the last axis of x [G,G,COUNT] as a tuple of tensors [G,G]."""
    HALF: tl.constexpr = COUNT // 2
    a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], HALF, 2]))
    if HALF == 1:
        return tl.reshape(a, [x.shape[0], x.shape[1]]), tl.reshape(b, [x.shape[0], x.shape[1]])
    else:
        even, odd = split_values(a, HALF), split_values(b, HALF)
        values = ()
        for i in tl.static_range(HALF):
            values = values + (even[i], odd[i])
        return values


@triton.jit
def join_values(values, FIRST: tl.constexpr, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """Return the COUNT values number FIRST, FIRST + STRIDE, ... of the tuple as one tensor [G,G,COUNT]."""
    if COUNT == 2:
        return tl.join(values[FIRST], values[FIRST + STRIDE])
    else:
        HALF: tl.constexpr = COUNT // 2
        a = join_values(values, FIRST, 2 * STRIDE, HALF)
        b = join_values(values, FIRST + STRIDE, 2 * STRIDE, HALF)
        return tl.reshape(tl.join(a, b), [a.shape[0], a.shape[1], COUNT])


@triton.jit
def _edge(at_edge, outer, middle):
    corner = middle + outer
    return Edge(
        far=tl.where(at_edge, 0.0, outer),
        near=tl.where(at_edge, 0.0, middle),
        end=tl.where(at_edge, 1.0 + corner, 1.0),
        corner=tl.where(at_edge, corner, middle),
    )


@triton.jit
def _filter(number, LAST: tl.constexpr, outer, middle):
    return Filter(outer, middle, _edge(number == 0, outer, middle), _edge(number == LAST, outer, middle))


@triton.jit
def threads_of(outer, middle, zero, G: tl.constexpr):
    """Return the `Threads` of a plane of G x G tiles; zero: 0, unknown when compiling."""
    row = tl.arange(0, G)[:, None] + tl.zeros([G, G], tl.int32)
    column = tl.arange(0, G)[None, :] + tl.zeros([G, G], tl.int32)
    own = (row * zero).to(tl.float32)
    outer, middle = own + outer, own + middle
    return Threads(
        row, column, own,
        _filter(row, G - 1, outer, middle), _filter(column, G - 1, outer, middle),
        _filter(row, G - 1, 1.0, 1.0), _filter(column, G - 1, 1.0, 1.0),
    )  # fmt: skip


@triton.jit
def _five(a, a_factor, b, b_factor, c, c_factor, d, d_factor, e, e_factor):
    return tl.fma(a, a_factor, tl.fma(b, b_factor, tl.fma(c, c_factor, tl.fma(d, d_factor, e * e_factor))))


@triton.jit
def _line(x, beyond, taps, T: tl.constexpr, ADJOINT: tl.constexpr):
    """Return the T values of B x, or of B^T x, for a row or a column x of the tile; taps: a `Filter`.

    beyond: the values around x: (second before, first before, first after, second after).
    """
    lo2, lo1, hi1, hi2 = beyond
    low, high, outer, middle = taps.low, taps.high, taps.outer, taps.middle
    if T == 2:
        low_corner, high_corner = high.corner, low.corner
        if ADJOINT:
            low_corner, high_corner = low.corner, high.corner
        return (
            _five(lo2, low.far, lo1, low.near, hi1, high.far, x[0], low.end, x[1], low_corner),
            _five(hi2, high.far, hi1, high.near, lo1, low.far, x[1], high.end, x[0], high_corner),
        )
    else:
        x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
        y0, y1, y2, y3 = x[T - 1], x[T - 2], x[T - 3], x[T - 4]
        if ADJOINT:
            first = _five(lo2, low.far, lo1, low.near, x2, outer, x0, low.end, x1, low.corner)
            last = _five(hi2, high.far, hi1, high.near, y2, outer, y0, high.end, y1, high.corner)
            second = tl.fma(lo1, low.far, tl.fma(x3, outer, tl.fma(x0 + x2, middle, x1)))
            last_but_one = tl.fma(hi1, high.far, tl.fma(y3, outer, tl.fma(y0 + y2, middle, y1)))
        else:
            first = _five(lo2, low.far, lo1, low.near, x2, outer, x0, low.end, x1, middle)
            last = _five(hi2, high.far, hi1, high.near, y2, outer, y0, high.end, y1, middle)
            second = _five(lo1, low.far, x3, outer, x2, middle, x0, low.corner, x1, 1.0)
            last_but_one = _five(hi1, high.far, y3, outer, y2, middle, y0, high.corner, y1, 1.0)
        out = first, second
        for i in tl.static_range(2, T - 2):
            out = out + (tl.fma(x[i - 2] + x[i + 2], outer, tl.fma(x[i - 1] + x[i + 1], middle, x[i])),)
        return out + (last_but_one, last)


@triton.jit
def _row(p, ROW: tl.constexpr, column, T: tl.constexpr):
    """Return a row of the tile and the values before and after it, which are in the same warp."""
    before, after = tl.maximum(column - 1, 0), tl.minimum(column + 1, column.shape[1] - 1)
    x = ()
    for c in tl.static_range(T):
        x = x + (p[ROW * T + c],)
    lo2, lo1 = tl.gather(x[T - 2], before, 1), tl.gather(x[T - 1], before, 1)
    return x, (lo2, lo1, tl.gather(x[0], after, 1), tl.gather(x[1], after, 1))


@triton.jit
def _along_rows(p, column, taps, T: tl.constexpr, ADJOINT: tl.constexpr):
    """Filter each row of the tile."""
    out = ()
    for r in tl.static_range(T):
        x, beyond = _row(p, r, column, T)
        out = out + _line(x, beyond, taps, T, ADJOINT)
    return out


@triton.jit
def _from_above_and_below(down, up, row, T: tl.constexpr):
    """Lend `down` to the tile below and `up` to the one above, 2 T values each; return what this tile gets.

    All values travel at once, through shared memory. The first of the result came from above.
    """
    above, below = tl.maximum(row - 1, 0), tl.minimum(row + 1, row.shape[0] - 1)
    number = tl.arange(0, 4 * T)[None, None, :]
    at = tl.where(number < 2 * T, above[:, :, None], below[:, :, None])
    return split_values(tl.gather(join_values(down + up, 0, 1, 4 * T), at, 0), 4 * T)


@triton.jit
def _down_columns(p, row, taps, T: tl.constexpr, ADJOINT: tl.constexpr):
    """Filter each column of the tile."""
    down, up = (), ()
    for c in tl.static_range(T):
        down = down + (p[(T - 2) * T + c], p[(T - 1) * T + c])
        up = up + (p[c], p[T + c])
    beside = _from_above_and_below(down, up, row, T)
    columns = ()
    for c in tl.static_range(T):
        x = ()
        for r in tl.static_range(T):
            x = x + (p[r * T + c],)
        beyond = beside[2 * c], beside[2 * c + 1], beside[2 * T + 2 * c], beside[2 * T + 2 * c + 1]
        columns = columns + _line(x, beyond, taps, T, ADJOINT)
    out = ()
    for r in tl.static_range(T):
        for c in tl.static_range(T):
            out = out + (columns[c * T + r],)
    return out


@triton.jit
def _plus(a, b, T: tl.constexpr):
    out = ()
    for i in tl.static_range(T):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def _sum_blurred(p, threads, T: tl.constexpr, ADJOINT: tl.constexpr):
    """Filter the tile with the kernel of entries g_i + g_j, g the taps.

    With f and s a row filtered along itself with the taps and with ones, row r adds f + g_i s to row r + i. What it
    adds to the two rows above and below the tile is lent to other threads.
    """
    outer, middle = threads.down.outer, threads.down.middle
    # Row by row, so that few values are alive: the sums of rows r - 2 to r + 1 are not complete.
    complete = ()
    for r in tl.static_range(T):
        x, beyond = _row(p, r, threads.column, T)
        filtered = _line(x, beyond, threads.along, T, ADJOINT)
        summed = _line(x, beyond, threads.box_along, T, ADJOINT)
        own, near, far = _plus(filtered, summed, T), (), ()
        for c in tl.static_range(T):
            near = near + (tl.fma(summed[c], middle, filtered[c]),)
            far = far + (tl.fma(summed[c], outer, filtered[c]),)
        if r == 0:
            copies_above = _plus(near, far, T)
            complete, sums = (far,), (near, own, near, far)
        else:
            complete = complete + (_plus(sums[0], far, T),)
            sums = _plus(sums[1], near, T), _plus(sums[2], own, T), _plus(sums[3], near, T), far
    copies_below = _plus(near, far, T)
    rows = complete + sums
    beside = _from_above_and_below(rows[T + 2] + rows[T + 3], rows[1] + rows[0], threads.row, T)
    # What rows beyond the plane, copies of the row at the edge, add to that row and the next.
    above, above_next = copies_above, rows[0]
    below, below_next = copies_below, rows[T + 3]
    if ADJOINT:
        above, below = _plus(rows[0], rows[1], T), _plus(rows[T + 2], rows[T + 3], T)
    first, last = threads.row == 0, threads.row == threads.row.shape[0] - 1
    out = ()
    for r in tl.static_range(T):
        for c in tl.static_range(T):
            total = rows[r + 2][c]
            if r == 0:
                total += tl.where(first, above[c], beside[c])
            if r == 1:
                total += tl.where(first, 0.0 if ADJOINT else above_next[c], beside[T + c])
            if r == T - 1:
                total += tl.where(last, below[c], beside[2 * T + c])
            if r == T - 2:
                total += tl.where(last, 0.0 if ADJOINT else below_next[c], beside[3 * T + c])
            out = out + (total,)
    return out


@triton.jit
def _across(x, number, taps, AXIS: tl.constexpr, STEP: tl.constexpr, ADJOINT: tl.constexpr):
    """Return B x, or B^T x, along an axis on which STEP threads hold the same value.

    number: the place of a thread on the axis.
    """
    outer, middle = taps.outer, taps.middle
    corner = middle + outer
    LAST: tl.constexpr = x.shape[AXIS] // STEP - 1
    four = tl.arange(0, 4)[None, None, :]
    # -2, -1, 1 and 2 values away.
    away = four - tl.where(four < 2, 2, 1)
    at = tl.minimum(tl.maximum(number[:, :, None] + STEP * away, 0), x.shape[AXIS] - 1)
    lo2, lo1, hi1, hi2 = split_values(tl.gather(join_values((x, x, x, x), 0, 1, 4), at, AXIS), 4)
    i = number // STEP
    FIRST_CORNER: tl.constexpr = LAST if ADJOINT else 1
    LAST_CORNER: tl.constexpr = 0 if ADJOINT else LAST - 1
    low = tl.where(i == 0, 0.0, tl.where(i == FIRST_CORNER, corner, middle))
    high = tl.where(i == LAST, 0.0, tl.where(i == LAST_CORNER, corner, middle))
    center = 1.0 + tl.where(i == 0, corner, 0.0) + tl.where(i == LAST, corner, 0.0)
    far_low, far_high = tl.where(i < 2, 0.0, outer), tl.where(i > LAST - 2, 0.0, outer)
    return _five(lo2, far_low, hi2, far_high, lo1, low, hi1, high, x, center)


@triton.jit
def blurred(p, threads, T: tl.constexpr, STEP: tl.constexpr, SUM: tl.constexpr, ADJOINT: tl.constexpr):
    """Return the blur of a tile times the sum of its taps, or its adjoint.

    SUM: the blur of the paper's code, whose kernel has the entries g_i + g_j where others have a product.
    """
    row, column = threads.row, threads.column
    if T == 1:
        if SUM:
            y = _across(p[0], column, threads.along, 1, STEP, ADJOINT)
            z = _across(p[0], column, threads.box_along, 1, STEP, ADJOINT)
            y = _across(y, row, threads.box_down, 0, STEP, ADJOINT)
            return (y + _across(z, row, threads.down, 0, STEP, ADJOINT),)
        else:
            y = _across(p[0], column, threads.along, 1, STEP, ADJOINT)
            return (_across(y, row, threads.down, 0, STEP, ADJOINT),)
    elif SUM:
        return _sum_blurred(p, threads, T, ADJOINT)
    else:
        return _down_columns(_along_rows(p, column, threads.along, T, ADJOINT), row, threads.down, T, ADJOINT)
