"""The common parts of the implementations of `nearest_rows`: the frame of their products, and the exact decision."""

import torch
from torch import Tensor

# float64 differences in memory at once: 16 MB.
TERMS = 1 << 21


def frame(queries: Tensor, database: Tensor) -> tuple[Tensor, float]:
    """Return (offset float64 [d], scale): products are taken of (x - offset) * scale, where nothing overflows.

    The offset is the database's mean, which takes out what all rows share; distances do not depend on it, so
    it need not be exact. The scale is the power of two that takes the largest value to between 1/2 and 1.
    """
    offset = database.mean(dim=0, dtype=torch.float64)
    extremes = [f(dim=0).double() for x in (queries, database) for f in (x.amin, x.amax)]
    largest = (torch.stack(extremes) - offset).abs().amax().clamp_min(1e-290)
    return offset, 2.0 ** -float(largest.log2().ceil())


def direct_distance(queries: Tensor, database: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """Return [P] float64, the squared distance of queries[query] and database[row], by difference.

    The squares are added by halves (the second half onto the first, and so on): one order on every device, in
    every chunk and for every implementation, so equal rows have equal distances.
    """
    step = max(1, TERMS // queries.shape[1])
    parts = [torch.empty(0, dtype=torch.float64, device=queries.device)]
    for i in range(0, len(query), step):
        term = queries[query[i : i + step]].double() - database[row[i : i + step]].double()  # [p,d]
        term = term.square_()
        while term.shape[1] > 1:
            half = (term.shape[1] + 1) // 2
            term[:, : term.shape[1] - half] += term[:, half:]
            term = term[:, :half]
        parts.append(term[:, 0])
    return torch.cat(parts)


def best_of_pairs(n: int, query: Tensor, row: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """Return per query the smallest distance and the lowest row that has it: (row int64 [n], distance float64 [n]).

    A query without pairs gets a row that does not exist, at distance infinity.
    """
    best = torch.full((n,), torch.inf, dtype=torch.float64, device=distance.device)
    best = best.scatter_reduce(0, query, distance, "amin")
    lowest = torch.full((n,), torch.iinfo(torch.int64).max, device=distance.device)
    ties = distance == best[query]
    return lowest.scatter_reduce(0, query[ties], row[ties], "amin"), best


def direct_search(queries: Tensor, database: Tensor) -> tuple[Tensor, Tensor]:
    """Return (index int64 [N], squared distance float64 [N]) from the differences of every pair; slow, always right.

    Meant for the queries whose nearest rows are many and all but equal: equal rows are looked at once.
    """
    distinct, group = database.unique(dim=0, return_inverse=True)
    rows = torch.full((len(distinct),), len(database), device=database.device)
    rows = rows.scatter_reduce(0, group, torch.arange(len(database), device=database.device), "amin")
    rows = rows.sort().values  # the first of each set of equal rows
    index = torch.full((len(queries),), torch.iinfo(torch.int64).max, device=queries.device)
    distance = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=queries.device)
    step = max(1, TERMS // queries.shape[1] // len(queries))
    for part in rows.split(step):
        query = torch.arange(len(queries), device=queries.device).repeat_interleave(len(part))
        candidate = part.repeat(len(queries))
        row, near = best_of_pairs(
            len(queries), query, candidate, direct_distance(queries, database, query, candidate)
        )
        # Rows ascend from part to part, so on equality the earlier one stays.
        nearer = near < distance
        index, distance = torch.where(nearer, row, index), torch.where(nearer, near, distance)
    return index, distance
