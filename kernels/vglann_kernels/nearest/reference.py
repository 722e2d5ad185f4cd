"""Exact nearest rows in plain PyTorch: products propose rows, float64 differences decide.

The nearest row has the largest score q.c - |c|^2 / 2. Scores are matrix products, first in the cheapest
dtype. Rounding moves a score by less than a bound that is computed with it, so only a row whose score plus
bound reaches the best score minus its bound can be the nearest. A query with many of those waits for the next
dtype.
"""

import torch
from torch import Tensor

from .exact import best_of_pairs, direct_distance, direct_search, frame
from .scan import Scan

# Queries that show whether a dtype decides most of them.
PROBED = 64


def nearest_rows(queries: Tensor, database: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Return (index int64 [N], squared distance float64 [N], stats as in `op.nearest_rows`), N >= 1."""
    offset, scale = frame(queries, database)
    index = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    distance = torch.empty(len(queries), dtype=torch.float64, device=queries.device)
    waiting, pairs, scratch, certified = torch.arange(len(queries), device=queries.device), 0, 0, []
    for dtype in score_dtypes(queries.device):
        if dtype != torch.float64 and len(waiting) >= 64 * PROBED:
            sample = waiting[:: len(waiting) // PROBED]
            if scanned(queries[sample], database, offset, scale, dtype).many.float().mean() > 0.5:
                # A pass that decides so little costs more than it saves.
                continue
        rows = queries[waiting]
        scan = scanned(rows, database, offset, scale, dtype)
        query, row = scan.candidates()
        index[waiting], distance[waiting] = best_of_pairs(
            len(rows), query, row, direct_distance(rows, database, query, row)
        )
        pairs, scratch = pairs + len(query), max(scratch, scan.scratch_bytes)
        waiting = waiting[scan.many]
        certified.append(1 - len(waiting) / len(queries))
        if len(waiting) == 0:
            break
    for some in waiting.split(64) if len(waiting) else ():
        index[some], distance[some] = direct_search(queries[some], database)
    stats = {
        "certified": certified[0],
        "candidates_per_query": pairs / len(queries),
        "scratch_bytes": scratch,
    }
    return index, distance, stats


def scanned(queries: Tensor, database: Tensor, offset: Tensor, scale: float, dtype: torch.dtype) -> Scan:
    """Return a finished scan of the queries over the whole database."""
    scan = Scan(queries, offset, scale, dtype)
    for first in range(0, len(database), scan.rows):
        scan.look_at(database[first : first + scan.rows], first)
    return scan


def score_dtypes(device: torch.device) -> list[torch.dtype]:
    """Return the dtypes that scores are computed in, one after the other.

    bfloat16 where the CPU multiplies it, float32 unless the process lets its products be rounded further, float64.
    """
    on_cpu = device.type == "cpu"
    backend = torch.backends.mkldnn if on_cpu else torch.backends.cuda
    modes = (backend.matmul.fp32_precision, torch.backends.fp32_precision)  # type: ignore[attr-defined]
    exact = all(mode in ("none", "ieee") for mode in modes)
    bfloat16 = on_cpu and torch.cpu._is_avx512_bf16_supported()
    return [torch.bfloat16] * bfloat16 + [torch.float32] * exact + [torch.float64]
