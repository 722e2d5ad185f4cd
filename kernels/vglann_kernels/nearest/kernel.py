"""The nearest rows on the matrix units: a float16 scan that keeps one number per query and 128 database rows.

Four kernels, in this order; README.md beside this file derives the bound.

1. `_pack_kernel` brings rows into float16, scaled by a power of two, and measures what that cut off.
2. `_scan_kernel` multiplies packed queries and packed rows and keeps the largest score of each group of rows.
3. `_select_kernel` lists, for each query, the groups whose score can reach the best one.
4. `_decide_kernel` computes the float64 distances of the rows in these groups and hands out the smallest.

A query with too many groups is scanned again with twice the float16 parts, and after that left to the
reference. The last word always has `exact.direct_distance`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LAUNCH
from .tiles import RESIDENT, STEP_COLUMNS, packed_columns, tiles_of

# Database rows that share one value of the scan, and rows of one program of the packing.
GROUP_ROWS = 128
# Rows of a query that `_decide_kernel` returns.
KEPT_ROWS = 4
# Groups that a program of the scan works through.
PER_PROGRAM = 64
SELECT = {"GROUPS": 64, "QUERIES": 32}

GROUP = tl.constexpr(GROUP_ROWS)
KEPT = tl.constexpr(KEPT_ROWS)
# Columns read at once where rows are packed and distances decided.
COLUMNS = tl.constexpr(16)
STEP = tl.constexpr(STEP_COLUMNS)
# float16 ends at 65504.
LARGEST = tl.constexpr(60000.0)


@triton.jit
def _power_of_two(exponent):
    """Return 2^exponent, exactly, as float64; exponent int64 within -1000 .. 1000."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["n", "d", "typical"])
def _pack_kernel(
    rows_ptr, offset_ptr, high_ptr, low_ptr, multiplier_ptr, by_length_ptr, by_lost_ptr, by_half_ptr,
    n, d, typical, K: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Write rows [n,d], less the offset, as float16 [.,K] and what the bound needs; see README.md, "The bound".

    Database rows share one scale a group, queries have their own. The last row is repeated behind itself.
    """
    # rows [n,d] float32 or float64. float64: offset [d]. float16: high, low [count,K].
    # float32: multiplier, by_length, by_lost, by_half, one value a query or a group.
    group = tl.program_id(0).to(tl.int64)
    slot = group * GROUP + tl.arange(0, GROUP)
    row = tl.minimum(slot, n - 1)
    square = tl.zeros([GROUP], tl.float64)
    for first in range(0, d, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (column < d)[None, :]
        x = tl.load(rows_ptr + row[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float64)
        x -= tl.load(offset_ptr + column, mask=column < d, other=0.0)[None, :]
        square += tl.sum(x * x, axis=1)
    # Lengths come to between 16 and 32 after scaling: far from float16's largest and smallest numbers.
    exponent = tl.floor(tl.log2(tl.maximum(square, 1e-280)) * 0.5).to(tl.int64) - 4
    if QUERIES:
        exponent = tl.minimum(tl.maximum(exponent, typical - 15), typical + 24)
    else:
        exponent = tl.minimum(tl.maximum(exponent, typical - 40), typical + 40)
        exponent = tl.zeros([GROUP], tl.int64) + tl.max(exponent, axis=0)
    scale = _power_of_two(-exponent)
    half = square * scale * scale * _power_of_two(exponent - typical) * 0.5
    half_1 = tl.minimum(half, LARGEST).to(tl.float16)
    half_2 = tl.minimum(half - half_1.to(tl.float64), LARGEST).to(tl.float16)
    factor = _power_of_two(typical - exponent)
    kept = tl.zeros([GROUP], tl.float64)
    lost = tl.zeros([GROUP], tl.float64)
    second = tl.zeros([GROUP], tl.float64)
    for first in range(0, K, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (column < d)[None, :]
        x = tl.load(rows_ptr + row[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float64)
        x -= tl.load(offset_ptr + column, mask=column < d, other=0.0)[None, :]
        x *= scale[:, None]
        x_high = tl.minimum(tl.maximum(x, -LARGEST), LARGEST).to(tl.float16)
        rest = x - x_high.to(tl.float64)
        kept += tl.sum(x_high.to(tl.float64) * x_high.to(tl.float64), axis=1)
        packed_offset = slot[:, None] * K + column[None, :]
        if PARTS == 2:
            x_low = tl.minimum(tl.maximum(rest, -LARGEST), LARGEST).to(tl.float16)
            rest -= x_low.to(tl.float64)
            second += tl.sum(x_low.to(tl.float64) * x_low.to(tl.float64), axis=1)
            tl.store(low_ptr + packed_offset, x_low, mask=(column < K)[None, :])
        lost += tl.sum(rest * rest, axis=1)
        if QUERIES:
            behind = tl.broadcast_to(factor[:, None], [GROUP, COLUMNS]).to(tl.float16)
            behind = tl.where((column < d + 2)[None, :], behind, 0.0)
        else:
            behind = tl.where((column == d)[None, :], -half_1[:, None], 0.0)
            behind = tl.where((column == d + 1)[None, :], -half_2[:, None], behind)
        x_high = tl.where(inside, x_high, behind.to(tl.float16))
        tl.store(high_ptr + packed_offset, x_high, mask=(column < K)[None, :])
    # Tensor cores cut off up to 2^-23 of each of four products, and of their sum.
    summing = (1.25 * K + 24) * 1.1920929e-07
    if QUERIES:
        length = tl.sqrt(kept) + tl.sqrt(second)
        tl.store(multiplier_ptr + slot, factor.to(tl.float32))
        missing = tl.sqrt(lost) + tl.sqrt(second) * 0.0009765625 + summing * length
        tl.store(by_length_ptr + slot, missing.to(tl.float32))
        tl.store(by_lost_ptr + slot, length.to(tl.float32))
        # What float64 may round a distance by, (d + 8) 2^-52 |q|^2, in the unit of the selection.
        rounding = square * scale * scale / factor * (d + 8) * 2.220446049250313e-16
        tl.store(by_half_ptr + slot, rounding.to(tl.float32))
    else:
        back = _power_of_two(tl.max(exponent, axis=0) - typical)
        lost = tl.sqrt(tl.max(lost, axis=0))
        length = tl.sqrt(tl.max(square * scale * scale, axis=0))
        rest = tl.abs(half - half_1.to(tl.float64) - half_2.to(tl.float64)) + summing * half
        tl.store(multiplier_ptr + group, back.to(tl.float32))
        tl.store(by_length_ptr + group, ((length + lost) * back).to(tl.float32))
        tl.store(by_lost_ptr + group, (lost * back).to(tl.float32))
        tl.store(by_half_ptr + group, (tl.max(rest, axis=0) * back).to(tl.float32))


@triton.jit
def _tiles(matrix_ptr, rows, K: tl.constexpr, FIRST: tl.constexpr):
    """Load the columns from FIRST to K of `rows` of a [.,K] matrix, in tiles 16, 32 or 64 wide, the widest last.

    The last product of one program is the longest, so that it covers most of another's maximum on sm_90.
    """
    WIDTH: tl.constexpr = 16 if (K - FIRST) % 32 else (32 if (K - FIRST) % 64 else 64)
    tile = tl.load(matrix_ptr + rows[:, None] * K + (FIRST + tl.arange(0, WIDTH))[None, :])
    if FIRST + WIDTH == K:
        return (tile,)
    else:  # noqa: RET505, so that only one of the returns is compiled
        return (tile,) + _tiles(matrix_ptr, rows, K, FIRST + WIDTH)  # noqa: RUF005, Triton has no stars


@triton.jit(do_not_specialize=["groups", "padded", "per_program"])
def _scan_kernel(
    q_ptr, c_ptr, maxima_ptr, groups, padded, per_program,
    K: tl.constexpr, QUERIES: tl.constexpr, AT_ONCE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Set maxima[group, query] to the largest score of the group's rows.

    The COUNT tiles of each AT_ONCE queries stay on chip, and are multiplied with a group one after the other.
    """
    # float16: q [padded,K], c [groups * GROUP,K]. float32: maxima [groups,padded].
    query = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, AT_ONCE)
    first = tl.program_id(1).to(tl.int64) * per_program
    query_tiles = ()
    for start in tl.static_range(0, QUERIES, AT_ONCE):
        query_tiles = query_tiles + _tiles(q_ptr, query + start, K, 0)
    for number in range(first, tl.minimum(first + per_program, groups)):
        group = tl.cast(number, tl.int64)
        rows = group * GROUP + tl.arange(0, GROUP)
        tiles = _tiles(c_ptr, rows, K, 0)
        for start in tl.static_range(0, QUERIES, AT_ONCE):
            scores = tl.zeros([AT_ONCE, GROUP], tl.float32)
            for i in tl.static_range(COUNT):
                scores = tl.dot(query_tiles[start // AT_ONCE * COUNT + i], tl.trans(tiles[i]), scores)
            tl.store(maxima_ptr + group * padded + query + start, tl.max(scores, axis=1))


@triton.jit(do_not_specialize=["groups", "padded", "per_program"])
def _stepped_scan_kernel(
    q_ptr, q_low_ptr, c_ptr, c_low_ptr, maxima_ptr, groups, padded, per_program,
    K: tl.constexpr, QUERIES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Scan rows of any length as `_scan_kernel` does, and with PARTS == 2 values in two float16 parts.

    The products with a low part have a sum of their own, where the large sum does not round them.
    """
    # float16: q, q_low [padded,K]; c, c_low [groups * GROUP,K]. float32: maxima [groups,padded].
    query = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    first = tl.program_id(1).to(tl.int64) * per_program
    for number in range(first, tl.minimum(first + per_program, groups)):
        group = tl.cast(number, tl.int64)
        row = group * GROUP + tl.arange(0, GROUP)
        scores = tl.zeros([QUERIES, GROUP], tl.float32)
        small = tl.zeros([QUERIES, GROUP], tl.float32)
        for start in range(0, K, STEP):
            column = start + tl.arange(0, STEP)
            q_offset = query[:, None] * K + column[None, :]
            c_offset = column[:, None] + row[None, :] * K
            a, b = tl.load(q_ptr + q_offset), tl.load(c_ptr + c_offset)
            scores = tl.dot(a, b, scores)
            if PARTS == 2:
                small = tl.dot(a, tl.load(c_low_ptr + c_offset), small)
                small = tl.dot(tl.load(q_low_ptr + q_offset), b, small)
        if PARTS == 2:
            scores += small
        tl.store(maxima_ptr + group * padded + query, tl.max(scores, axis=1))


@triton.jit
def _values(maxima_ptr, c_ptr, q_ptr, group, groups, query, padded):
    """Return (score, bound) [GROUPS,QUERIES] of groups for queries, in a unit that all groups share.

    c and q hold `Packed.numbers`, [4,groups] and [4,padded].
    """
    offset = group[:, None].to(tl.int64) * padded + query[None, :]
    inside = group < groups
    score = tl.load(maxima_ptr + offset, mask=inside[:, None], other=0.0)
    score *= tl.load(c_ptr + group, mask=inside, other=0.0)[:, None]
    by_length = tl.load(c_ptr + groups + group, mask=inside, other=0.0)[:, None]
    by_lost = tl.load(c_ptr + 2 * groups + group, mask=inside, other=0.0)[:, None]
    by_half = tl.load(c_ptr + 3 * groups + group, mask=inside, other=0.0)[:, None]
    bound = by_length * tl.load(q_ptr + padded + query)[None, :]
    bound += by_lost * tl.load(q_ptr + 2 * padded + query)[None, :]
    bound += by_half * tl.load(q_ptr + query)[None, :]
    bound += tl.load(q_ptr + 3 * padded + query)[None, :]
    # The last terms cover the rounding of the lines above.
    return score, bound * 1.001 + tl.abs(score) * 2.4e-07


@triton.jit(do_not_specialize=["groups", "padded"])
def _select_kernel(
    maxima_ptr, c_ptr, q_ptr, slots_ptr, count_ptr, groups, padded,
    MAX_GROUPS: tl.constexpr, GROUPS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Set slots[query, :MAX_GROUPS] to the first groups that may hold the best row, count[query] to their number."""
    # float32: maxima [groups,padded], c [4,groups], q [4,padded]. int32: slots [padded,MAX_GROUPS], count [padded].
    query = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        score, bound = _values(maxima_ptr, c_ptr, q_ptr, group, groups, query, padded)
        at_least = score - bound
        # A bound of inf * 0 is unknown.
        known = (group < groups)[:, None] & (at_least == at_least)
        best = tl.maximum(best, tl.max(tl.where(known, at_least, float("-inf")), axis=0))
    selected = tl.zeros([QUERIES], tl.int32)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        score, bound = _values(maxima_ptr, c_ptr, q_ptr, group, groups, query, padded)
        # False where the bound is unknown.
        beaten = score + bound < best[None, :]
        stays = ((group < groups)[:, None] & (beaten == 0)).to(tl.int32)
        place = selected[None, :] + tl.cumsum(stays, axis=0) - 1
        group = tl.broadcast_to(group[:, None], [GROUPS, QUERIES])
        tl.store(
            slots_ptr + query[None, :] * MAX_GROUPS + place, group, mask=(stays == 1) & (place < MAX_GROUPS)
        )
        selected += tl.sum(stays, axis=0)
    tl.store(count_ptr + query, selected)


@triton.jit
def _distances(queries_ptr, database_ptr, query, row, m, d):
    """Return [GROUP] float64, the squared distances of one query to rows of the database, infinite past its end."""
    total = tl.zeros([GROUP, COLUMNS], tl.float64)
    for first in range(0, d, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row < m)[:, None] & (column < d)[None, :]
        x = tl.load(queries_ptr + query * d + column, mask=column < d, other=0.0).to(tl.float64)
        y = tl.load(database_ptr + row[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float64)
        x = tl.where(inside, x[None, :] - y, 0.0)
        total += x * x
    return tl.where(row < m, tl.sum(total, axis=1), float("inf"))


@triton.jit(do_not_specialize=["m", "d"])
def _decide_kernel(
    queries_ptr, database_ptr, slots_ptr, count_ptr, rows_ptr, equal_ptr, m, d, MAX_GROUPS: tl.constexpr
):
    """Set rows[query, :KEPT] to the rows with the smallest distance up to rounding, equal[query] to their number."""
    # queries [n,d], database [m,d]: float32 or float64. int32: slots [padded,MAX_GROUPS], count [padded], equal [n].
    # int64: rows [n,KEPT].
    query = tl.program_id(0).to(tl.int64)
    groups = tl.load(count_ptr + query)
    if groups <= MAX_GROUPS:
        smallest = tl.full([GROUP], float("inf"), tl.float64)
        for i in range(groups):
            row = tl.load(slots_ptr + query * MAX_GROUPS + i).to(tl.int64) * GROUP + tl.arange(0, GROUP)
            smallest = tl.minimum(smallest, _distances(queries_ptr, database_ptr, query, row, m, d))
        # Sums of up to 512 squares in two orders differ by less than 1e-12 of their size.
        limit = tl.min(smallest, axis=0) * (1 + 1e-12)
        total = 0
        for i in range(groups):
            row = tl.load(slots_ptr + query * MAX_GROUPS + i).to(tl.int64) * GROUP + tl.arange(0, GROUP)
            near = (_distances(queries_ptr, database_ptr, query, row, m, d) <= limit) & (row < m)
            place = total + tl.cumsum(near.to(tl.int32), axis=0) - 1
            tl.store(rows_ptr + query * KEPT + place, row, mask=near & (place < KEPT))
            total += tl.sum(near.to(tl.int32), axis=0)
        tl.store(equal_ptr + query, total)


class Packed:
    """Rows in float16 and the numbers of their bound: one of each a query, or one a group of the database.

    `count` rows are packed, at least as many as there are: the last one is repeated. See `_pack_kernel`.
    """

    def __init__(
        self, rows: Tensor, offset: Tensor, typical: int, parts: int, count: int, queries: bool
    ) -> None:
        k, groups = packed_columns(rows.shape[1], parts), count // GROUP_ROWS
        self.high = torch.empty(count, k, dtype=torch.float16, device=rows.device)
        self.low = torch.empty_like(self.high) if parts == 2 else self.high
        columns = count if queries else groups
        self.numbers = torch.empty(4, columns, dtype=torch.float32, device=rows.device)
        _pack_kernel[(groups,)](
            rows, offset, self.high, self.low, *self.numbers, len(rows), rows.shape[1], typical,
            K=k, PARTS=parts, QUERIES=queries, num_warps=4, **LAUNCH,
        )  # fmt: skip


def scan(q: Packed, c: Packed, parts: int, options: dict[str, int]) -> Tensor:
    """Return [groups,queries] float32, the largest packed score of each group of database rows for each query."""
    (padded, k), groups = q.high.shape, c.numbers.shape[1]
    maxima = torch.empty(groups, padded, dtype=torch.float32, device=q.high.device)
    per_program = max(PER_PROGRAM, -(-groups // (1 << 15)))
    grid = (padded // options["QUERIES"], -(-groups // per_program))
    if parts == 1 and k <= RESIDENT:
        _scan_kernel[grid](
            q.high, c.high, maxima, groups, padded, per_program, K=k, COUNT=tiles_of(k), **options, **LAUNCH
        )
    else:
        _stepped_scan_kernel[grid](
            q.high, q.low, c.high, c.low, maxima, groups, padded, per_program, K=k, PARTS=parts, **options,
            **LAUNCH,
        )  # fmt: skip
    return maxima


def select(maxima: Tensor, q: Packed, c: Packed, max_groups: int) -> tuple[Tensor, Tensor]:
    """Return (slots int32 [queries,max_groups], count int32 [queries]) of the groups that may hold the best row."""
    groups, padded = maxima.shape
    slots = torch.empty(padded, max_groups, dtype=torch.int32, device=maxima.device)
    count = torch.empty(padded, dtype=torch.int32, device=maxima.device)
    _select_kernel[(padded // SELECT["QUERIES"],)](
        maxima, c.numbers, q.numbers, slots, count, groups, padded, MAX_GROUPS=max_groups, num_warps=4,
        **SELECT, **LAUNCH,
    )  # fmt: skip
    return slots, count


def decide(queries: Tensor, database: Tensor, slots: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return (rows int64 [n,KEPT_ROWS], equal int32 [n]): the nearest rows in float64 and their number.

    rows is -1 where there are fewer rows; equal is more than KEPT_ROWS where not all are returned or none was
    looked for. Both inputs are contiguous.
    """
    n, d = queries.shape
    rows = torch.full((n, KEPT_ROWS), -1, dtype=torch.int64, device=queries.device)
    equal = torch.full((n,), KEPT_ROWS + 1, dtype=torch.int32, device=queries.device)
    _decide_kernel[(n,)](
        queries, database, slots, count, rows, equal, len(database), d, MAX_GROUPS=slots.shape[1],
        num_warps=4, **LAUNCH,
    )  # fmt: skip
    return rows, equal
