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

GROUP_ROWS = 128  # database rows of one number of the scan, and rows of one program of the packing
KEPT_ROWS = 4  # rows of a query that `_decide_kernel` hands out
RESIDENT = 144  # packed columns up to which the queries of a program of the scan stay on chip
HALF_COLUMNS = 2  # float16 pieces of |c|^2 / 2, in columns behind the row
PER_PROGRAM = 64  # groups that a program of the scan works through
SELECT = {"GROUPS": 64, "QUERIES": 32}

GROUP = tl.constexpr(GROUP_ROWS)
KEPT = tl.constexpr(KEPT_ROWS)
COLUMNS = tl.constexpr(16)  # read at once where rows are packed and distances decided
STEP = tl.constexpr(32)  # columns of a step of the scan whose queries do not stay on chip
LARGEST = tl.constexpr(60000.0)  # float16 ends at 65504


@triton.jit
def _power_of_two(exponent):
    """2^exponent, exactly, as float64; exponent int64 within -1000 .. 1000."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["n", "d", "typical"])
def _pack_kernel(
    rows, offset, high, low, multiplier, by_length, by_lost, by_half, n, d, typical,
    K: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Rows [n,d], less the offset, as float16 [.,K] and what the bound needs; see README.md, "The bound".

    Database rows share one scale a group, queries have their own. Behind the last row it is repeated.
    """
    group = tl.program_id(0).to(tl.int64)
    slot = group * GROUP + tl.arange(0, GROUP)
    row = tl.minimum(slot, n - 1)
    square = tl.zeros([GROUP], tl.float64)
    for first in range(0, d, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (column < d)[None, :]
        x = tl.load(rows + row[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float64)
        x -= tl.load(offset + column, mask=column < d, other=0.0)[None, :]
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
        x = tl.load(rows + row[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float64)
        x -= tl.load(offset + column, mask=column < d, other=0.0)[None, :]
        x *= scale[:, None]
        x_high = tl.minimum(tl.maximum(x, -LARGEST), LARGEST).to(tl.float16)
        rest = x - x_high.to(tl.float64)
        kept += tl.sum(x_high.to(tl.float64) * x_high.to(tl.float64), axis=1)
        at = slot[:, None] * K + column[None, :]
        if PARTS == 2:
            x_low = tl.minimum(tl.maximum(rest, -LARGEST), LARGEST).to(tl.float16)
            rest -= x_low.to(tl.float64)
            second += tl.sum(x_low.to(tl.float64) * x_low.to(tl.float64), axis=1)
            tl.store(low + at, x_low, mask=(column < K)[None, :])
        lost += tl.sum(rest * rest, axis=1)
        if QUERIES:
            behind = tl.broadcast_to(factor[:, None], [GROUP, COLUMNS]).to(tl.float16)
            behind = tl.where((column < d + 2)[None, :], behind, 0.0)
        else:
            behind = tl.where((column == d)[None, :], -half_1[:, None], 0.0)
            behind = tl.where((column == d + 1)[None, :], -half_2[:, None], behind)
        tl.store(high + at, tl.where(inside, x_high, behind.to(tl.float16)), mask=(column < K)[None, :])
    summing = (K + 24) * 1.1920929e-07  # 2^-23 for each product that is added
    if QUERIES:
        length = tl.sqrt(kept) + tl.sqrt(second)
        tl.store(multiplier + slot, factor.to(tl.float32))
        missing = tl.sqrt(lost) + tl.sqrt(second) * 0.0009765625 + summing * length
        tl.store(by_length + slot, missing.to(tl.float32))
        tl.store(by_lost + slot, length.to(tl.float32))
        # What float64 may round a distance by, (d + 8) 2^-52 |q|^2, in the unit of the selection.
        tl.store(
            by_half + slot, (square * scale * scale / factor * (d + 8) * 2.220446049250313e-16).to(tl.float32)
        )
    else:
        back = _power_of_two(tl.max(exponent, axis=0) - typical)
        lost = tl.sqrt(tl.max(lost, axis=0))
        length = tl.sqrt(tl.max(square * scale * scale, axis=0))
        rest = tl.abs(half - half_1.to(tl.float64) - half_2.to(tl.float64)) + summing * half
        tl.store(multiplier + group, back.to(tl.float32))
        tl.store(by_length + group, ((length + lost) * back).to(tl.float32))
        tl.store(by_lost + group, (lost * back).to(tl.float32))
        tl.store(by_half + group, (tl.max(rest, axis=0) * back).to(tl.float32))


@triton.jit
def _tiles(base, rows, K: tl.constexpr, FIRST: tl.constexpr):
    """The columns from FIRST to K of `rows` of a [.,K] matrix, in tiles 64, 32 or 16 wide."""
    WIDTH: tl.constexpr = 64 if K - FIRST >= 64 else (32 if K - FIRST >= 32 else 16)
    tile = tl.load(base + rows[:, None] * K + (FIRST + tl.arange(0, WIDTH))[None, :])
    if FIRST + WIDTH == K:
        return (tile,)
    else:  # noqa: RET505, so that only one of the returns is compiled
        return (tile,) + _tiles(base, rows, K, FIRST + WIDTH)  # noqa: RUF005, Triton has no stars


@triton.jit(do_not_specialize=["groups", "padded", "per_program"])
def _scan_kernel(
    q, c, maxima, groups, padded, per_program, K: tl.constexpr, QUERIES: tl.constexpr, COUNT: tl.constexpr
):
    """maxima[group, query] = the largest score of the group's rows; the queries' COUNT tiles stay on chip."""
    query = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    first = tl.program_id(1).to(tl.int64) * per_program
    own = _tiles(q, query, K, 0)
    for number in range(first, tl.minimum(first + per_program, groups)):
        group = tl.cast(number, tl.int64)
        rows = group * GROUP + tl.arange(0, GROUP)
        tiles = _tiles(c, rows, K, 0)
        scores = tl.zeros([QUERIES, GROUP], tl.float32)
        for i in tl.static_range(COUNT):
            scores = tl.dot(own[i], tl.trans(tiles[i]), scores)
        tl.store(maxima + group * padded + query, tl.max(scores, axis=1))


@triton.jit(do_not_specialize=["groups", "padded", "per_program"])
def _stepped_scan_kernel(
    q, q_low, c, c_low, maxima, groups, padded, per_program,
    K: tl.constexpr, QUERIES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """As `_scan_kernel` for rows of any length, and with PARTS == 2 for values in two float16 parts.

    The products with a low part have a sum of their own, where the large sum does not round them.
    """
    query = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    first = tl.program_id(1).to(tl.int64) * per_program
    for number in range(first, tl.minimum(first + per_program, groups)):
        group = tl.cast(number, tl.int64)
        row = group * GROUP + tl.arange(0, GROUP)
        scores = tl.zeros([QUERIES, GROUP], tl.float32)
        small = tl.zeros([QUERIES, GROUP], tl.float32)
        for start in range(0, K, STEP):
            column = start + tl.arange(0, STEP)
            q_at = query[:, None] * K + column[None, :]
            c_at = column[:, None] + row[None, :] * K
            a, b = tl.load(q + q_at), tl.load(c + c_at)
            scores = tl.dot(a, b, scores)
            if PARTS == 2:
                small = tl.dot(a, tl.load(c_low + c_at), small)
                small = tl.dot(tl.load(q_low + q_at), b, small)
        if PARTS == 2:
            scores += small
        tl.store(maxima + group * padded + query, tl.max(scores, axis=1))


@triton.jit
def _values(maxima, c, q, group, groups, query, padded):
    """(score, bound) [GROUPS,QUERIES] of groups for queries, in a unit that all groups share.

    c and q hold `Packed.numbers`, [4,groups] and [4,padded].
    """
    at = group[:, None].to(tl.int64) * padded + query[None, :]
    inside = group < groups
    score = tl.load(maxima + at, mask=inside[:, None], other=0.0)
    score *= tl.load(c + group, mask=inside, other=0.0)[:, None]
    bound = (
        tl.load(c + groups + group, mask=inside, other=0.0)[:, None] * tl.load(q + padded + query)[None, :]
    )
    bound += (
        tl.load(c + 2 * groups + group, mask=inside, other=0.0)[:, None]
        * tl.load(q + 2 * padded + query)[None, :]
    )
    bound += tl.load(c + 3 * groups + group, mask=inside, other=0.0)[:, None] * tl.load(q + query)[None, :]
    bound += tl.load(q + 3 * padded + query)[None, :]
    return score, bound * 1.001 + tl.abs(score) * 2.4e-07  # the rounding of these lines


@triton.jit(do_not_specialize=["groups", "padded"])
def _select_kernel(
    maxima,
    c,
    q,
    slots,
    count,
    groups,
    padded,
    MOST: tl.constexpr,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """slots[query, :MOST] = the first groups that may hold the best row; count[query] = how many there are."""
    query = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        score, bound = _values(maxima, c, q, group, groups, query, padded)
        at_least = score - bound
        known = (group < groups)[:, None] & (at_least == at_least)  # a bound of inf * 0 is unknown
        best = tl.maximum(best, tl.max(tl.where(known, at_least, float("-inf")), axis=0))
    found = tl.zeros([QUERIES], tl.int32)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        score, bound = _values(maxima, c, q, group, groups, query, padded)
        beaten = score + bound < best[None, :]  # false where it is unknown
        stays = ((group < groups)[:, None] & (beaten == 0)).to(tl.int32)
        place = found[None, :] + tl.cumsum(stays, axis=0) - 1
        group = tl.broadcast_to(group[:, None], [GROUPS, QUERIES])
        tl.store(slots + query[None, :] * MOST + place, group, mask=(stays == 1) & (place < MOST))
        found += tl.sum(stays, axis=0)
    tl.store(count + query, found)


@triton.jit
def _distances(queries, database, query, row, m, d):
    """[GROUP] float64: squared distances of one query to rows of the database, infinite past its end."""
    total = tl.zeros([GROUP, COLUMNS], tl.float64)
    for first in range(0, d, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row < m)[:, None] & (column < d)[None, :]
        x = tl.load(queries + query * d + column, mask=column < d, other=0.0).to(tl.float64)
        y = tl.load(database + row[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float64)
        x = tl.where(inside, x[None, :] - y, 0.0)
        total += x * x
    return tl.where(row < m, tl.sum(total, axis=1), float("inf"))


@triton.jit(do_not_specialize=["m", "d"])
def _decide_kernel(queries, database, slots, count, rows, found, m, d, MOST: tl.constexpr):
    """rows[query, :KEPT] = the rows whose distance is the smallest up to rounding; found = how many there
    are."""
    query = tl.program_id(0).to(tl.int64)
    groups = tl.load(count + query)
    if groups <= MOST:
        smallest = tl.full([GROUP], float("inf"), tl.float64)
        for i in range(groups):
            row = tl.load(slots + query * MOST + i).to(tl.int64) * GROUP + tl.arange(0, GROUP)
            smallest = tl.minimum(smallest, _distances(queries, database, query, row, m, d))
        # Sums of up to 512 squares in two orders differ by less than 1e-12 of their size.
        limit = tl.min(smallest, axis=0) * (1 + 1e-12)
        total = 0
        for i in range(groups):
            row = tl.load(slots + query * MOST + i).to(tl.int64) * GROUP + tl.arange(0, GROUP)
            near = (_distances(queries, database, query, row, m, d) <= limit) & (row < m)
            place = total + tl.cumsum(near.to(tl.int32), axis=0) - 1
            tl.store(rows + query * KEPT + place, row, mask=near & (place < KEPT))
            total += tl.sum(near.to(tl.int32), axis=0)
        tl.store(found + query, total)


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
            K=k, PARTS=parts, QUERIES=queries, num_warps=4,
        )  # fmt: skip


def packed_columns(d: int, parts: int) -> int:
    """Columns of a packed row: the row, the pieces of |c|^2 / 2, and zeros up to a multiple of a step."""
    k = -(-(d + HALF_COLUMNS) // 16) * 16
    return k if parts == 1 and k <= RESIDENT else -(-k // STEP.value) * STEP.value


def scan_options(capability: tuple[int, int], k: int, parts: int) -> dict[str, int]:
    """Queries of a program, warps and stages of the scan: as much as 227 KB, or 99 KB, of shared memory and the
    registers hold without spilling."""
    large = capability[0] in (9, 10)
    if parts == 2:
        queries, warps, stages = (128, 8, 3) if large else (64, 4, 3)
    elif k > RESIDENT:
        queries, warps, stages = (128, 8, 3) if large else (128, 8, 2)
    else:
        queries, warps, stages = (256, 8, 3) if large else (128, 8, 3 if k <= 128 else 2)
    return {"QUERIES": queries, "num_warps": warps, "num_stages": stages}


def tiles_of(k: int) -> int:
    """How many tiles `_tiles` makes of k columns."""
    return k // 64 + k % 64 // 32 + k % 32 // 16


def scan(q: Packed, c: Packed, parts: int, options: dict[str, int]) -> Tensor:
    """[groups,queries] float32: the largest packed score of each group of database rows for each query."""
    (padded, k), groups = q.high.shape, c.numbers.shape[1]
    maxima = torch.empty(groups, padded, dtype=torch.float32, device=q.high.device)
    per_program = max(PER_PROGRAM, -(-groups // (1 << 15)))
    grid = (padded // options["QUERIES"], -(-groups // per_program))
    if parts == 1 and k <= RESIDENT:
        _scan_kernel[grid](
            q.high, c.high, maxima, groups, padded, per_program, K=k, COUNT=tiles_of(k), **options
        )
    else:
        _stepped_scan_kernel[grid](
            q.high, q.low, c.high, c.low, maxima, groups, padded, per_program, K=k, PARTS=parts, **options
        )
    return maxima


def select(maxima: Tensor, q: Packed, c: Packed, most: int) -> tuple[Tensor, Tensor]:
    """(slots int32 [queries,most], count int32 [queries]) of the groups that may hold the best row."""
    groups, padded = maxima.shape
    slots = torch.empty(padded, most, dtype=torch.int32, device=maxima.device)
    count = torch.empty(padded, dtype=torch.int32, device=maxima.device)
    _select_kernel[(padded // SELECT["QUERIES"],)](
        maxima, c.numbers, q.numbers, slots, count, groups, padded, MOST=most, num_warps=4, **SELECT
    )
    return slots, count


def decide(queries: Tensor, database: Tensor, slots: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """(rows int64 [n,KEPT_ROWS], found int32 [n]): the nearest rows in float64 and how many there are.

    -1 where there are fewer rows; found is more than KEPT_ROWS where not all are handed out or none was looked
    for. Both inputs are contiguous.
    """
    n, d = queries.shape
    rows = torch.full((n, KEPT_ROWS), -1, dtype=torch.int64, device=queries.device)
    found = torch.full((n,), KEPT_ROWS + 1, dtype=torch.int32, device=queries.device)
    _decide_kernel[(n,)](
        queries, database, slots, count, rows, found, len(database), d, MOST=slots.shape[1], num_warps=4
    )
    return rows, found
