"""Data that break nearest-neighbour searches, and the plain float64 answer."""

import torch
import torch.nn.functional as F
from torch import Tensor


def brute_force(queries: Tensor, database: Tensor) -> tuple[Tensor, Tensor]:
    """(lowest index of the smallest float64 distance [N], that squared distance float64 [N])."""
    index, best = [], []
    for query in queries.double():
        distance = (query - database.double()).square().sum(dim=1)
        best.append(distance.min())
        index.append((distance == best[-1]).nonzero()[0, 0])
    if not index:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    return torch.stack(index), torch.stack(best)


def _unit(rows: int, d: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(rows, d, generator=generator), dim=1)


def _clustered(n: int, m: int, d: int, spread: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    centres = _unit(8, d, generator)
    return tuple(
        centres[torch.arange(rows) % 8] + spread * torch.randn(rows, d, generator=generator)
        for rows in (n, m)
    )


def hard_case(name: str, n: int = 60, m: int = 700, d: int = 20) -> tuple[Tensor, Tensor]:
    """(queries [n,d], database [m,d]) float32 of the case `name`; sizes named in the case are its own."""
    g = torch.Generator().manual_seed(7)
    queries, database = _unit(n, d, g), _unit(m, d, g)
    match name:
        case "unit rows":
            pass
        case "near ties":  # every row has a twin that differs by less than float16 resolves
            half = database[: m // 2]
            database = torch.cat([half, half * (1 + 2.0**-13 * torch.randn(len(half), 1, generator=g))])
        case "nearer ties":  # twins that differ in the last bits of float32
            half = database[: m // 2]
            database = torch.cat([half, half * (1 + 2.0**-22 * torch.randn(len(half), 1, generator=g))])
        case "norms 0.1 to 10":
            queries, database = (
                x * 10.0 ** torch.empty(len(x), 1).uniform_(-1, 1, generator=g) for x in (queries, database)
            )
        case "norms 1e-12 to 1e12":
            queries, database = (
                x * 10.0 ** torch.empty(len(x), 1).uniform_(-12, 12, generator=g) for x in (queries, database)
            )
        case "tiny":
            queries, database = queries * 1e-12, database * 1e-12
        case "huge":
            queries, database = queries * 1e12, database * 1e12
        case "near the ends of float32":
            queries, database = queries * 1e38, database * 1e38
        case "offset 1000":
            queries, database = queries + 1000, database + 1000
        case "queries far off":
            queries = queries + 1000
        case "tight clusters":
            queries, database = _clustered(n, m, d, 1e-3, g)
        case "tightest clusters":
            queries, database = _clustered(n, m, d, 1e-6, g)
        case "all rows equal":
            database = database[:1].expand(m, d).contiguous()
        case "all zero":
            queries, database = torch.zeros(n, d), torch.zeros(m, d)
        case "one outlier":
            database[m // 2] = 1e6
        case "one query an outlier":
            queries[n // 2] = 1e6
        case "one row":
            database = database[:1]
        case "no queries":
            queries = queries[:0]
        case "planted ties":  # the query itself, three times
            where = torch.randperm(m, generator=g)[: 3 * (n // 4)].view(3, -1)
            for copy in where:
                database[copy] = queries[: n // 4]
        case "symmetric ties":  # +x and -x are equally far from 0
            queries = torch.zeros(n, d)
            database = torch.cat([database[: m // 2], -database[: m // 2]])
        case "one dimension":
            queries, database = torch.randn(n, 1, generator=g), torch.randn(m, 1, generator=g)
        case "a query beyond float64":  # all its differences round to the query itself
            queries[n // 2] *= 1e25
        case "integers":  # many exact ties
            queries, database = (torch.randint(-2, 3, (rows, 4), generator=g).float() for rows in (n, m))
        case _:
            raise ValueError(name)
    return queries, database


HARD_CASES = (
    "unit rows", "near ties", "nearer ties", "norms 0.1 to 10", "norms 1e-12 to 1e12", "tiny", "huge",
    "near the ends of float32", "offset 1000", "queries far off", "tight clusters", "tightest clusters",
    "all rows equal", "all zero", "one outlier", "one query an outlier", "one row", "no queries",
    "planted ties", "symmetric ties", "one dimension", "integers", "a query beyond float64",
)  # fmt: skip
