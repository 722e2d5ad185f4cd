"""The matching of IMLE: which noise vector of a pool each latent gets."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from vglann_kernels import nearest_rows
from vglann_kernels.nearest.sharded import nearest_rows_sharded

from vglann_fast.errors import VglannError
from vglann_fast.runtime.distributed import Ranks


def search(queries: Tensor, database: Tensor) -> tuple[Tensor, Tensor]:
    """As `nearest_rows`; under torchrun each process searches its part of the database.

    All processes call it with the same tensors and get the same answer.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return nearest_rows(queries, database)
    parts = torch.tensor_split(database, dist.get_world_size())
    rank = dist.get_rank()
    return nearest_rows_sharded(queries, parts[rank], sum(map(len, parts[:rank])))


def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Under torchrun overwrite `tensors` by the tensors of process 0.

    Processes take the same steps, but rounding may part them, and then each would search what another network made.
    """
    if dist.is_available() and dist.is_initialized():
        Ranks(dist.get_rank(), dist.get_world_size()).broadcast(tensors)


def match(
    latents: Tensor, mapped: Tensor, reject_quantile: float = 0.0, data: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(index int64 [N], distance [N]): for each latent [N,d] its nearest row of `mapped` [M,d], Euclidean.

    With a `reject_quantile` q > 0, RS-IMLE: epsilon is the q-quantile of these distances, rows nearer than
    epsilon to any row of `data` (default: the latents) are rejected, and latents whose row was rejected get the
    nearest of the rest. Vashist, Peng and Li, "Rejection Sampling IMLE", 2024. Raises `VglannError` when all
    rows are rejected.
    """
    index, squared = search(latents, mapped)
    distance = squared.sqrt()
    if reject_quantile > 0:
        epsilon = distance.sort().values[int(reject_quantile * len(distance))]
        keep = ~rejected(latents if data is None else data, mapped, epsilon)
        again = (~keep[index]).nonzero()[:, 0]
        if len(again):
            index[again], distance[again] = match_kept(latents[again], mapped, keep)
    return index, distance


def rejected(latents: Tensor, mapped: Tensor, epsilon: Tensor) -> Tensor:
    """Bool [M]: which rows of `mapped` are nearer than `epsilon` [] to any latent."""
    return search(mapped, latents)[1].sqrt() < epsilon


def match_kept(latents: Tensor, mapped: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """(index int64 [N], distance [N]) of the nearest of the rows that `keep` [M] leaves.

    Raises `VglannError` when it leaves none.
    """
    rows = keep.nonzero()[:, 0]
    if len(rows) == 0:
        raise VglannError(
            f"--reject-quantile: all {len(keep)} noise vectors of the pool are nearer to a latent than that; "
            "lower it or raise --pool-factor"
        )
    index, squared = search(latents, mapped[rows])
    return rows[index], squared.sqrt()
