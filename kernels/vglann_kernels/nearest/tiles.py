"""Sizes of the scan: columns of a packed row, queries of a program and of a product."""

from __future__ import annotations

# float16 pieces of |c|^2 / 2, in columns behind the row.
HALF_COLUMNS = 2
# Packed columns up to which the queries of a program stay on chip.
RESIDENT = 144
# Columns of a step where they do not.
STEP_COLUMNS = 32
# Packed columns up to which two programs of 256 queries and two groups each fit on a multiprocessor of 228 KB.
SHARED_BY_TWO = 112


def packed_columns(d: int, parts: int) -> int:
    """Return the columns of a packed row: the row, the pieces of |c|^2 / 2, and zeros up to a multiple of a step."""
    k = -(-(d + HALF_COLUMNS) // 16) * 16
    return k if parts == 1 and k <= RESIDENT else -(-k // STEP_COLUMNS) * STEP_COLUMNS


def scan_options(capability: tuple[int, int], k: int, parts: int) -> dict[str, int]:
    """Return queries of a program, queries of one product where they stay on chip, warps and stages of the scan.

    They are as many as 227 KB, or 99 KB, of shared memory and the registers hold without spilling.
    """
    large = capability[0] in (9, 10)
    if parts == 2:
        queries, warps, stages = (128, 8, 3) if large else (64, 4, 3)
    elif k > RESIDENT:
        queries, warps, stages = (128, 8, 3) if large else (128, 8, 2)
    elif capability[0] == 9 and k <= SHARED_BY_TWO:
        # The products of one program hide the maximum of the other; within a program they wait for it.
        queries, warps, stages = 256, 4, 2
    else:
        queries, warps, stages = (256, 8, 3) if large else (128, 8, 3 if k <= 128 else 2)
    options = {"QUERIES": queries, "num_warps": warps, "num_stages": stages}
    if parts == 1 and k <= RESIDENT:
        # 128 scores a thread.
        options["AT_ONCE"] = min(queries, 32 * warps)
    return options


def tiles_of(k: int) -> int:
    """Return the number of tiles that `_tiles` makes of k columns."""
    return k // 64 + k % 64 // 32 + k % 32 // 16
