"""`nearest_rows`: the exact nearest row of a database for each query."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import impl as switch
from ..checks import check_same_device, check_shape, check_tensor
from ..launch import why_no_triton
from . import faiss, reference

MAX_ROWS = 2**31 - 1
TRITON_COLUMNS = 512


def _triton(queries: Tensor, database: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
    from . import search  # imports triton

    return search.nearest_rows(queries, database)


IMPLEMENTATIONS = {"reference": reference.nearest_rows, "faiss": faiss.nearest_rows, "triton": _triton}

switch.register("nearest", "reference")
switch.register("nearest", "faiss", faiss.why_not)
switch.register("nearest", "triton", why_no_triton)


@overload
def nearest_rows(
    queries: Tensor, database: Tensor, *, return_stats: Literal[False] = False, impl: str | None = None
) -> tuple[Tensor, Tensor]: ...


@overload
def nearest_rows(
    queries: Tensor, database: Tensor, *, return_stats: Literal[True], impl: str | None = None
) -> tuple[Tensor, Tensor, dict[str, Any]]: ...


@torch.no_grad()
def nearest_rows(
    queries: Tensor, database: Tensor, *, return_stats: bool = False, impl: str | None = None
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, Any]]:
    """Return (index int64 [N], squared distance float32 [N]) of the nearest row of `database` [M,d] to each
    of `queries` [N,d].

    The answer is the argmin of the float64 distance of the inputs as given, the lowest index on equality,
    with every implementation: they propose candidates by fast arithmetic with an error bound and decide by
    direct float64 difference. The squared distance is that value rounded to float32 (inf where it is above
    3.4e38).

    float32 or float64 inputs of one dtype on one device, M < 2^31. Waits for the device; not for graph capture.
    `return_stats` adds a dict: "impl" that ran; "certified", the share of queries whose answer its first
    pass over all of them was sure to contain; "candidates_per_query" decided in float64; "scratch_bytes" of its large
    buffers. `impl`: "auto", "reference", "faiss" or "triton" (d up to 512).
    Raises TypeError on a wrong dtype; ValueError on a wrong shape, mixed devices, an empty database or values
    that are not finite.
    """
    check_tensor("queries", queries, (torch.float32, torch.float64))
    check_tensor("database", database, (queries.dtype,))
    check_shape("queries", queries, ("N", "d"))
    check_shape("database", database, ("M", queries.shape[1]))
    check_same_device("queries", queries, "database", database)
    if database.shape[0] == 0 or database.shape[1] == 0:
        raise ValueError(f"database: expected at least one row and one column, got {tuple(database.shape)}")
    if len(database) > MAX_ROWS:
        raise ValueError(
            f"database: expected at most {MAX_ROWS} rows, got {len(database)}; search it in parts"
        )
    for name, rows in (("queries", queries), ("database", database)):
        if not bool(rows.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    d = queries.shape[1]
    unsupported = (
        None if d <= TRITON_COLUMNS else f"rows of {d} values; the kernel takes up to {TRITON_COLUMNS}"
    )
    name = switch.chosen("nearest", impl, queries.device, unsupported)
    if len(queries) == 0:
        index = torch.empty(0, dtype=torch.int64, device=queries.device)
        distance = torch.empty(0, dtype=torch.float64, device=queries.device)
        stats = {"certified": 1.0, "candidates_per_query": 0.0, "scratch_bytes": 0}
    else:
        with torch.autocast(queries.device.type, enabled=False):
            index, distance, stats = IMPLEMENTATIONS[name](queries, database)
    if return_stats:
        return index, distance.float(), {"impl": name, **stats}
    return index, distance.float()
