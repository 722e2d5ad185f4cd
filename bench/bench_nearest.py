"""Nearest rows side by side: ours, FAISS and flash-kmeans, on the same data in one process, in turns.

    python bench/bench_nearest.py [--n 50000] [--m 100000 1000000] [--d 100 128] [--run RUN] [--rounds 7]
    pytest bench/bench_nearest.py --benchmark-only

Every contender's answer is compared with float64 on up to 4,096 queries before its time is taken; those that are
not exact are timed as well, with their agreement beside them. One that cannot run says why. `--run` adds the
latents of a trained run against the output of its IMLE mapping. Under pytest, and by default without a GPU, the
sizes are small.
"""

import argparse
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vglann_kernels import ImplUnavailable, nearest_rows

from vglann_fast.experiments.timing import append_line, in_one_line, machine

CHECKED = 4096
OURS = ("reference", "faiss", "triton")
WARM_UP = 2
Search = Callable[[Tensor, Tensor], Tensor]  # queries, database -> index [N]


class CannotRun(Exception):
    """Reason that a contender has no time."""


def data_sets(
    n: int, m: int, d: int, device: torch.device, run: str | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, queries [n,d], database [m,d]), float32."""
    g = torch.Generator(device).manual_seed(0)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, d, generator=g, device=device)

    yield "uniform", *(torch.rand(rows, d, generator=g, device=device) for rows in (n, m))
    yield "unit sphere", *(F.normalize(normal(rows), dim=1) for rows in (n, m))
    centers = F.normalize(normal(100), dim=1)
    for spread in (1e-1, 1e-2, 1e-3):
        yield (
            f"clusters of {spread:g}",
            *(
                centers[torch.randint(100, (rows,), generator=g, device=device)] + spread * normal(rows)
                for rows in (n, m)
            ),
        )
    if run is not None:
        latents, mapped = trained(run, m, device)
        yield f"trained latents ({len(latents)})", latents[:n], mapped


def trained(run: str, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The latents of a run and m samples of its IMLE mapping."""
    from vglann_fast.glo.checkpoint import load_trained
    from vglann_fast.mapping.fit import load_mapping
    from vglann_fast.run.folder import RunDir

    opened = RunDir.open(run)
    mapped = load_mapping(opened, "imle", device).sample(m, torch.Generator(device).manual_seed(0))
    return load_trained(opened, device).latents.detach(), mapped.detach()


def ours(impl: str) -> Search:
    def search(queries: Tensor, database: Tensor) -> Tensor:
        try:
            return nearest_rows(queries, database, impl=impl)[0]
        except (ImplUnavailable, ValueError, MemoryError) as error:
            raise CannotRun(str(error)) from error

    return search


def raw_faiss_cpu(queries: Tensor, database: Tensor) -> Tensor:
    """`IndexFlatL2` as a user calls it, one neighbor, the filling of the index included."""
    if queries.is_cuda:
        raise CannotRun("faiss-cpu is timed on CPU tensors")
    try:
        import faiss
    except ImportError as error:
        raise CannotRun(str(error)) from error
    index = faiss.IndexFlatL2(database.shape[1])
    index.add(database.numpy())
    return torch.from_numpy(index.search(queries.numpy(), 1)[1][:, 0])


def raw_faiss_gpu(dtype: torch.dtype) -> Search:
    """`knn_gpu` on tensors of one dtype as they lie, one resources object, one neighbor."""

    def search(queries: Tensor, database: Tensor) -> Tensor:
        from vglann_kernels.nearest.faiss import _resources, why_not

        if not queries.is_cuda or why_not(queries.device):
            raise CannotRun(why_not(queries.device) or "no GPU")
        import faiss
        import faiss.contrib.torch_utils  # makes knn_gpu take tensors

        resources = _resources(queries.device)
        return faiss.knn_gpu(resources, queries.to(dtype), database.to(dtype), 1)[1][:, 0]

    return search


def flash_kmeans(queries: Tensor, database: Tensor) -> Tensor:
    """The assign kernel of flash-kmeans in bfloat16, padded with zeros to the next power of two columns."""
    if not queries.is_cuda:
        raise CannotRun("no GPU")
    try:
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton
    except ImportError as error:
        raise CannotRun(f"{error}; pip install flash-kmeans") from error
    padding = (1 << (queries.shape[1] - 1).bit_length()) - queries.shape[1]
    x, y = (F.pad(rows, (0, padding)).bfloat16()[None] for rows in (queries, database))
    squared = {"x_sq": x.float().square().sum(dim=2)} if _takes(euclid_assign_triton, "x_sq") else {}
    return euclid_assign_triton(x, y, **squared)[0].long()


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


CONTENDERS: dict[str, Search] = {
    "reference": ours("reference"),
    "faiss": ours("faiss"),
    "triton": ours("triton"),
    "raw faiss-cpu": raw_faiss_cpu,
    "raw faiss-gpu fp32": raw_faiss_gpu(torch.float32),
    "raw faiss-gpu fp16": raw_faiss_gpu(torch.float16),
    "raw faiss-gpu bf16": raw_faiss_gpu(torch.bfloat16),
    "flash-kmeans bf16": flash_kmeans,
}


def float64_answer(queries: Tensor, database: Tensor) -> Tensor:
    """Index [N] by brute force: direct differences in float64."""
    found = []
    for query in queries.double():
        best, at = torch.inf, 0
        for first in range(0, len(database), 1 << 17):
            part = (database[first : first + (1 << 17)].double() - query).square().sum(dim=1)
            low = part.min().item()
            if low < best:
                best, at = low, first + int((part == low).nonzero()[0])
        found.append(at)
    return torch.tensor(found, device=queries.device)


def seconds_of(search: Search, queries: Tensor, database: Tensor) -> float:
    """Of one call; a GPU is idle before and after."""
    _settle(queries.device)
    started = time.perf_counter()
    search(queries, database)
    _settle(queries.device)
    return time.perf_counter() - started


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(queries: Tensor, database: Tensor, rounds: int, checked: int = CHECKED) -> list[dict[str, Any]]:
    """One row a contender: agreement and median ms, or why it cannot run. Rounds are in turns."""
    rows: list[dict[str, Any]] = []
    exact = float64_answer(queries[:checked], database)
    for name, search in CONTENDERS.items():
        try:
            answer = search(queries, database)
        except CannotRun as error:
            rows.append({"contender": name, "why_not": " ".join(str(error).split())})
            continue
        except Exception as error:  # the others may run
            rows.append({"contender": name, "failed": in_one_line(error)})
            continue
        row = {"contender": name, "agreement": (answer[:checked] == exact).double().mean().item()}
        if name in OURS:
            stats = nearest_rows(queries, database, impl=name, return_stats=True)[2]
            row |= {key: value for key, value in stats.items() if key != "impl"}
        rows.append(row)
    times: dict[str, list[float]] = {row["contender"]: [] for row in rows if "agreement" in row}
    for number in range(WARM_UP + rounds):
        for name, values in times.items():
            seconds = seconds_of(CONTENDERS[name], queries, database)
            if number >= WARM_UP:
                values.append(seconds)
    for row in rows:
        if row["contender"] in times:
            row["ms"] = 1e3 * median(times[row["contender"]])
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| contender | ms | agrees | certified | candidates | scratch MB |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "ms" not in row:
            lines.append(f"| {row['contender']} | {row.get('why_not') or row['failed']} | | | | |")
            continue
        own = ""
        if "certified" in row:
            own = f"{row['certified']:.4f} | {row['candidates_per_query']:.1f} | {row['scratch_bytes'] / 1e6:.0f}"
        lines.append(f"| {row['contender']} | {row['ms']:.1f} | {row['agreement']:.4%} | {own or '| |'} |")
    return "\n".join(lines)


def test_nearest_rows_against_the_others(benchmark):
    """Small; ours must agree everywhere, the others are only reported."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n, m = (50_000, 100_000) if device.type == "cuda" else (500, 5_000)
    results = {}
    for name, queries, database in data_sets(n, m, 100, device, None):
        rows = compare(queries, database, rounds=3, checked=200)
        for row in rows:
            assert "failed" not in row, (name, row)
            if row["contender"] in OURS and "agreement" in row:
                assert row["agreement"] == 1, (name, row)
        results[name] = rows
    assert "ms" in results["uniform"][0]
    benchmark.extra_info |= {"device": str(device), "n": n, "m": m, "d": 100, "results": results}
    benchmark.pedantic(lambda: nearest_rows(queries, database), rounds=1)


def append(path: Path, group: str, rows: list[dict[str, Any]]) -> None:
    """Append a table to a file of results, which `report.py` reads."""
    by_name = {row["contender"]: {k: v for k, v in row.items() if k != "contender"} for row in rows}
    for row in by_name.values():
        if "why_not" in row:
            row["cannot_run"] = row.pop("why_not")
    append_line(path, {"group": group, **machine(), "rows": by_name})


def main() -> int:
    """Print one table for each size and data set; return 1 where a contender failed or ours was not exact."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=50_000 if on_gpu else 5_000)
    parser.add_argument("--m", type=int, nargs="+", default=[100_000, 1_000_000] if on_gpu else [50_000])
    parser.add_argument("--d", type=int, nargs="+", default=[100, 128])
    parser.add_argument("--run", help="a trained run with an IMLE mapping")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--checked", type=int, default=CHECKED if on_gpu else 256, help="queries against float64"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE.jsonl",
        help="append each table to this file as soon as it is known",
    )
    parser.add_argument("--data", nargs="+", help="data sets by name, default: all")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    a = parser.parse_args()
    device = torch.device(a.device)
    where = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    failed = False
    for d in a.d:
        for m in a.m:
            for name, queries, database in data_sets(a.n, m, d, device, a.run):
                if a.data and name not in a.data:
                    continue
                rows = compare(queries, database, a.rounds, a.checked)
                size = {"n": len(queries), "m": len(database), "d": queries.shape[1]}
                print(f"\n{name}, {size}, {where}\n\n{table(rows)}", flush=True)
                if a.json:
                    append(a.json, f"nearest {name} {len(queries)}x{m}x{d}", rows)
                failed |= any(row.get("agreement", 1) < 1 for row in rows if row["contender"] in OURS)
                failed |= any("failed" in row for row in rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
