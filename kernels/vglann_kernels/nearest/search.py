"""The search with the Triton kernels: a float16 scan, a wider one for what it leaves open, then the reference.

A query is settled by a scan when few groups of rows can hold its nearest and few of their rows are equally near
up to float64 rounding. The last word always has `exact.direct_distance`.
"""

import torch
from torch import Tensor

from ..launch import device_guard
from . import kernel, reference, tiles
from .exact import best_of_pairs, direct_distance

# Groups that may hold the nearest row of a query, in the first and in the wider scan.
MAX_GROUPS = (16, 64)
# For the values that a scan writes; queries are searched in portions that fit.
MAXIMA_BYTES = 256 << 20


def nearest_rows(queries: Tensor, database: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Search as `reference.nearest_rows` does, for rows of up to 512 values.

    Raises MemoryError when not even the smallest portion of queries fits into the free memory.
    """
    queries, database = queries.contiguous(), database.contiguous()
    offset = database.mean(dim=0, dtype=torch.float64)
    index = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    distance = torch.empty(len(queries), dtype=torch.float64, device=queries.device)
    waiting = torch.arange(len(queries), device=queries.device)
    decided, scratch, certified = 0, 0, []
    with device_guard(queries):
        for parts, max_groups in enumerate(MAX_GROUPS, 1):
            scan = _Scan(database, offset, parts, max_groups, len(waiting))
            left = []
            for part in waiting.split(scan.portion):
                query, row, settled, pairs = scan(queries[part])
                index[part], distance[part] = best_of_pairs(
                    len(part), query, row, direct_distance(queries[part], database, query, row)
                )
                left.append(part[~settled])
                decided += pairs
            scratch = max(scratch, scan.scratch_bytes)
            # The packed database is not needed beside the wider one.
            del scan
            waiting = torch.cat(left)
            certified.append(1 - len(waiting) / len(queries))
            if len(waiting) == 0:
                break
    if len(waiting):
        index[waiting], distance[waiting], rest = reference.nearest_rows(queries[waiting], database)
        decided += int(rest["candidates_per_query"] * len(waiting))
        scratch = max(scratch, int(rest["scratch_bytes"]))
    per_query = decided / len(queries)
    return (
        index,
        distance,
        {"certified": certified[0], "candidates_per_query": per_query, "scratch_bytes": scratch},
    )


class _Scan:
    """One pass over a database packed in `parts` float16 parts, for up to `portion` queries at a time."""

    def __init__(self, database: Tensor, offset: Tensor, parts: int, max_groups: int, n: int) -> None:
        self.database, self.offset, self.parts, self.max_groups = database, offset, parts, max_groups
        m, d = database.shape
        k, groups = tiles.packed_columns(d, parts), -(-m // kernel.GROUP_ROWS)
        capability = torch.cuda.get_device_capability(database.device) if database.is_cuda else (9, 0)
        self.options = tiles.scan_options(capability, k, parts)
        self.tile = self.options["QUERIES"]
        for_database = groups * (kernel.GROUP_ROWS * 2 * k * parts + 16)
        for_query = 2 * k * parts + 4 * groups + 4 * max_groups + 8 * kernel.KEPT_ROWS + 24
        free = _free_bytes(database)
        room = (free - for_database) // for_query // self.tile * self.tile
        if room < self.tile:
            raise MemoryError(
                f"nearest_rows: a database of {m:,} rows needs {for_database + self.tile * for_query:,} bytes of "
                f"scratch, {free:,} are free; search it in parts or use impl='reference'"
            )
        wanted = max(1, min(MAXIMA_BYTES // (4 * groups), n) // self.tile) * self.tile
        self.portion = min(wanted, room)
        self.scratch_bytes = for_database + self.portion * for_query
        sample = database[:: -(-m // 4096)].double() - offset
        usual = sample.square().sum(dim=1).median().sqrt().clamp(1e-120, 1e120)
        self.typical = int(usual.log2().floor()) - 4
        self.c = self._packed(database, groups * kernel.GROUP_ROWS, queries=False)

    def _packed(self, rows: Tensor, count: int, queries: bool) -> kernel.Packed:
        return kernel.Packed(rows, self.offset, self.typical, self.parts, count, queries)

    def __call__(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return (query, row, settled [n], pairs): pairs that hold the nearest row of every settled query, and the
        number of pairs that were compared for that."""
        q = self._packed(queries, -(-len(queries) // self.tile) * self.tile, queries=True)
        slots, count = kernel.select(
            kernel.scan(q, self.c, self.parts, self.options), q, self.c, self.max_groups
        )
        rows, equal = kernel.decide(queries, self.database, slots, count)
        settled = equal <= kernel.KEPT_ROWS
        query, slot = ((rows >= 0) & settled[:, None]).nonzero(as_tuple=True)
        looked_at = int((count[: len(queries)] * settled).sum()) * kernel.GROUP_ROWS
        return query, rows[query, slot], settled, looked_at


def _free_bytes(x: Tensor) -> int:
    """Return the bytes that can still be allocated on the tensor's GPU; plenty for the interpreter."""
    if not x.is_cuda:
        return 1 << 40
    unused = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
    return torch.cuda.mem_get_info(x.device)[0] + unused
