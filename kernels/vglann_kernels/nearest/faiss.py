"""FAISS as a proposer for `nearest_rows`: its brute force offers rows, float64 differences decide.

FAISS computes |q|^2 + |c|^2 - 2 q.c in float32. It is asked for a few rows of each query, and for more where
the last one offered is not farther than the first by twice what rounding can do.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import distributions
from typing import Any

import torch
from torch import Tensor

from . import reference
from .exact import best_of_pairs, direct_distance, frame

# Rows asked of FAISS per query: first, and at most.
FIRST, WIDEST = 4, 1024
# Bytes of temporary memory that FAISS may hold on a GPU.
TEMPORARY = 256 << 20


@cache
def why_not(device: torch.device) -> str | None:
    """Return None when `impl="faiss"` can run for tensors on `device`, else the reason."""
    try:
        import faiss
    # Two distributions in one folder fail in any way: a missing name, a wrong library.
    except Exception as error:
        return f"FAISS does not import ({type(error).__name__}: {error}); pip install faiss-cpu{_both()}"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"FAISS takes no {device.type} tensors"
    # faiss-cpu has knn_gpu, but not this name.
    if not hasattr(faiss, "StandardGpuResources"):
        return f"the FAISS installed here is built without GPU support{_both()}"
    if faiss.get_num_gpus() == 0:
        return "FAISS sees no GPU"
    return None


def _library() -> Any:
    """Return the module `faiss`. Its CPU and GPU builds contain different names."""
    return import_module("faiss")


def _both() -> str:
    """Return what to add to a reason when a CPU and a GPU distribution of FAISS are installed over each other."""
    names = sorted({str(d.metadata["Name"]) for d in distributions() if d.metadata["Name"]})
    installed = [name for name in names if name.lower().startswith("faiss-")]
    cpu, gpu = ([n for n in installed if n.startswith(f"faiss-{kind}")] for kind in ("cpu", "gpu"))
    if not (cpu and gpu):
        return ""
    return (
        f"; {' and '.join(cpu + gpu)} are both installed and overwrite each other: "
        f"pip uninstall {' '.join(cpu + gpu)}, then install one"
    )


def nearest_rows(queries: Tensor, database: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Search as `reference.nearest_rows` does; a query still open at WIDEST rows is left to the reference."""
    offset, scale = frame(queries, database)
    q, c = (_in_frame(x, offset, scale) for x in (queries, database))
    search = _cuda_search(c) if c.is_cuda else _cpu_search(c)
    error = _distance_error(q, c)
    index = torch.empty(len(q), dtype=torch.int64, device=q.device)
    distance = torch.empty(len(q), dtype=torch.float64, device=q.device)
    waiting, offered, pairs = torch.arange(len(q), device=q.device), min(FIRST, len(c)), 0
    certified: list[float] = []
    while len(waiting):
        near, row = search(q[waiting], offered)  # [n,offered] each, nearest first
        query = torch.arange(len(row), device=q.device).repeat_interleave(offered)
        exact = direct_distance(queries[waiting], database, query, row.flatten())
        index[waiting], distance[waiting] = best_of_pairs(len(row), query, row.flatten(), exact)
        pairs += len(query)
        if offered == len(c):
            waiting = waiting[:0]
        else:
            apart = near[:, -1].double() - near[:, 0].double()
            waiting = waiting[apart <= 2 * error[waiting]]
        certified.append(1 - len(waiting) / len(q))
        if offered >= WIDEST and len(waiting):
            index[waiting], distance[waiting], rest = reference.nearest_rows(queries[waiting], database)
            pairs += int(rest["candidates_per_query"] * len(waiting))
            break
        offered = min(8 * offered, WIDEST, len(c))
    scratch = q.nbytes + c.nbytes + (TEMPORARY if c.is_cuda else c.nbytes)
    stats = {"certified": certified[0], "candidates_per_query": pairs / len(q), "scratch_bytes": scratch}
    return index, distance, stats


def _in_frame(x: Tensor, offset: Tensor, scale: float) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    for i in range(0, len(x), 1 << 16):
        out[i : i + (1 << 16)] = (x[i : i + (1 << 16)].double() - offset) * scale
    return out


def _distance_error(q: Tensor, c: Tensor) -> Tensor:
    """Return [N] float64, the largest error of a distance that FAISS computes for a query.

    Rounding q and c to float32 changes a distance by 4u (|q| + |c|)^2, the sums of d products for |q|^2,
    |c|^2 and 2 q.c and their own sum by (d + 3) u (|q| + |c|)^2 at most, u = 2^-24; all of it is doubled.
    The last term covers numbers that vanish.
    """
    longest = torch.linalg.vector_norm(c, dim=1, dtype=torch.float64).amax()
    length = torch.linalg.vector_norm(q, dim=1, dtype=torch.float64)
    return (q.shape[1] + 8) * 2.0**-23 * (length + longest).square() + q.shape[1] * 2.0**-120


def _cpu_search(c: Tensor) -> Any:
    flat = _library().IndexFlatL2(c.shape[1])
    flat.add(c.numpy())

    def search(q: Tensor, k: int) -> tuple[Tensor, Tensor]:
        near, row = flat.search(q.numpy(), k)
        return torch.from_numpy(near), torch.from_numpy(row)

    return search


@cache
def _resources(device: torch.device) -> Any:
    """Return FAISS's memory and handles on a GPU, made once per process: that takes 0.1 s."""
    resources = _library().StandardGpuResources()
    resources.setTempMemory(TEMPORARY)
    return resources


def _cuda_search(c: Tensor) -> Any:
    """Brute force on the tensors' GPU and torch's current stream; nothing passes through the host."""
    faiss = _library()

    def search(q: Tensor, k: int) -> tuple[Tensor, Tensor]:
        near = torch.empty(len(q), k, dtype=torch.float32, device=q.device)
        row = torch.empty(len(q), k, dtype=torch.int64, device=q.device)
        with torch.cuda.device(q.device):
            resources = _resources(q.device)
            stream = torch.cuda.current_stream().cuda_stream
            resources.setDefaultStream(q.device.index, faiss.cast_integer_to_cudastream_t(stream))
            query = faiss.GpuDistanceParams()
            query.metric, query.k, query.dims = faiss.METRIC_L2, k, q.shape[1]
            query.vectors = faiss.cast_integer_to_float_ptr(c.data_ptr())
            query.vectorsRowMajor, query.numVectors = True, len(c)
            query.queries = faiss.cast_integer_to_float_ptr(q.data_ptr())
            query.queriesRowMajor, query.numQueries = True, len(q)
            query.outDistances = faiss.cast_integer_to_float_ptr(near.data_ptr())
            query.outIndices = faiss.cast_integer_to_idx_t_ptr(row.data_ptr())
            query.outIndicesType = faiss.IndicesDataType_I64
            query.device = q.device.index
            faiss.bfKnn(resources, query)
        return near, row

    return search
