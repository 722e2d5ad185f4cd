"""`nearest_rows` over a database whose rows lie in several processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .exact import direct_distance
from .op import nearest_rows


@torch.no_grad()
def nearest_rows_sharded(
    queries: Tensor, shard: Tensor, first: int, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return (index int64 [N], squared distance float32 [N]) over the rows of all processes, equal in each.

    Every process of the default group calls it with the same `queries` [N,d], its own rows `shard` [m,d], m >= 0,
    and the number of the first of them in the whole database. The answer is the same as in one process with all rows:
    the float64 distances are reduced, then the lowest index that has the smallest.
    """
    distance = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=queries.device)
    row = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    if len(shard):
        row, _ = nearest_rows(queries, shard, impl=impl)
        every = torch.arange(len(queries), device=queries.device)
        distance = direct_distance(queries, shard, every, row)
    best = distance.clone()
    dist.all_reduce(best, dist.ReduceOp.MIN)
    index = torch.where(distance == best, row + first, torch.iinfo(torch.int64).max)
    dist.all_reduce(index, dist.ReduceOp.MIN)
    return index, best.float()
