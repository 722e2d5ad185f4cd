"""Time the contenders of a group interleaved, on the device, and say what the times mean.

On a GPU `n` calls are captured in a CUDA graph and its replay is timed between two events, so that the gaps between
launches do not count. A contender that cannot be captured (it waits for the host) is timed between events as it is,
and its row says so. Calls that follow each other on the same inputs find in L2 what fits; copies of the inputs
prevent it. A contender that raises has a row that says so, and the others are timed.
Without a GPU the times are of the host clock and the shapes small; the Triton rows then say why they cannot run.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from vglann_kernels import ImplUnavailable
from vglann_kernels.laplacian import reference as laplacian_reference

from vglann_fast.experiments.clocks import Clocks

ROUNDS, WARM_UP = 7, 2
MAX_CALLS, WANTED_MS = 20, 2.0  # of a graph: calls, and the time they should fill
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = [(15, 32, 64), (256, 32, 64)] if DEVICE == "cuda" else [(1, 4, 64)]  # videos, frames, size
LAYOUTS = {"contiguous": False, "channels-last": True}
# Names the file to which each group of `pytest --benchmark-only` is appended.
VARIABLE = "VGLANN_BENCH_JSONL"
MODES = ("fwd", "bwd", "full")
Call = Callable[[], Any]
Contender = Callable[[], Call]  # does what is not timed, and gives one call that is


class CannotRun(RuntimeError):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Group:
    """Contenders for one result: the first is the reference, the others agree with it to `tolerance` (relative L2).

    floor_bytes: what the op must move: each input read once, each output written once.
    flops: what it does on the matrix units, if anything.
    """

    contenders: dict[str, Contender]
    tolerance: float
    floor_bytes: int
    flops: int = 0


def in_mode(mode: str, forward: Callable[[], Tensor], inputs: list[Tensor], upstream: Tensor) -> Contender:
    """`forward` alone ("fwd", its inputs require no gradient), the gradients of `inputs` alone ("bwd"), or both."""
    if mode == "fwd":
        return lambda: forward
    if mode == "full":
        return lambda: lambda: torch.autograd.grad(forward(), inputs, upstream)

    def prepare() -> Call:
        out = forward()
        # retained, since what a captured call reads has to stay where it is until the last replay
        return lambda: torch.autograd.grad(out, inputs, upstream, retain_graph=True)

    return prepare


def compiled(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`torch.compile` of `forward` for exactly these shapes, forgetting what was compiled before."""
    if DEVICE == "cpu":

        def call() -> Tensor:
            raise CannotRun("torch.compile is timed on a GPU only")

        return call
    torch.compiler.reset()  # else the ninth group would silently run eagerly
    torch._functorch.config.donated_buffer = (
        False  # a retained backward must not write over what it was given
    )
    return torch.compile(forward, dynamic=False, fullgraph=True)


def keep_band_matrices() -> None:
    """Make the band matrices of the eager loss once: made again at each call they would flatter ours."""
    made, kept = laplacian_reference.band_matrix, {}

    def band_matrix(n: int, taps: Any, like: Tensor) -> Tensor:
        key = (n, tuple(taps), like.dtype, like.device)
        if key not in kept:
            kept[key] = made(n, taps, like)
        return kept[key]

    laplacian_reference.band_matrix = band_matrix


def between_events(work: Call, clocks: Clocks | None = None) -> float:
    """Milliseconds of `work`: device time between two events, or host time without a GPU."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    work()
    last.record()
    if clocks:
        clocks.sample()  # while the device works
    last.synchronize()
    return first.elapsed_time(last)


class Timed:
    """A contender, warmed up and, on a GPU, captured. `timing` says how it is timed, `calls` how many at once.

    Several copies of it, on copies of the inputs, are called one after the other.
    """

    def __init__(self, *copies: Contender) -> None:
        self._copies = copies
        for copy in copies:
            for _ in range(WARM_UP):
                copy()()
        once = between_events(copies[0]())
        wanted = max(1, min(MAX_CALLS, round(WANTED_MS / max(once, 1e-3))))
        self.calls = math.ceil(wanted / len(copies)) * len(copies)
        self._graph: Any = None
        self.timing = "host clock"
        if DEVICE == "cuda":
            try:
                self._capture()
                self.timing = "CUDA graph"
            except RuntimeError as error:
                torch.cuda.synchronize()
                self.timing = f"eager launches ({str(error).splitlines()[0]})"

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a backward runs on the stream of its forward
            for copy in self._copies:
                copy()()
            self._held = self._prepared()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in self._held:
                call()
        graph.replay()
        torch.cuda.synchronize()
        self._graph = graph

    def _prepared(self) -> list[Call]:
        return [self._copies[number % len(self._copies)]() for number in range(self.calls)]

    def milliseconds(self, clocks: Clocks) -> float:
        """Of one call, the mean of `calls` in a row."""
        if self._graph is not None:
            return between_events(self._graph.replay, clocks) / self.calls
        calls = self._prepared()

        def work() -> None:
            for call in calls:
                call()

        return between_events(work, clocks) / self.calls


class Timing:
    """One a session: the two ceilings, timed in turns with each group, and the clocks.

    A copy (bytes read plus bytes written) and a product of square matrices, of random numbers: zeros are faster.
    """

    def __init__(self, rounds: int = ROUNDS) -> None:
        self.clocks, self._rounds = Clocks(), rounds
        megabytes, n = (1024, 8192) if DEVICE == "cuda" else (32, 512)
        source = torch.randint(0, 256, (megabytes << 20,), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
        self._copy_bytes, self._product_flops = 2 * source.numel(), 2 * n**3
        self._copy = Timed(lambda: lambda: target.copy_(source))
        self._product = Timed(lambda: lambda: a @ b)

    def group(self, group: Group, *copies: Group) -> dict[str, Any]:
        """Return everything that reports read: the rows by contender, the ceilings, clocks, versions, state of L2.

        `copies` are the same group on copies of its inputs. A row is {"ms", "range_ms", "timing", "calls",
        "gb_per_s", "share_of_copy"[, "share_of_matmul"]}, the median of the rounds, or {"cannot_run": why}, or
        {"failed": what it raised, or how far its result is off}.
        """
        wrong = disagreements(group)
        rows: dict[str, dict[str, Any]] = {}
        ready: dict[str, Timed] = {}
        for name in group.contenders:
            if name in wrong:
                rows[name] = {"failed": wrong[name]}
                continue
            try:
                ready[name] = Timed(*(every.contenders[name] for every in (group, *copies)))
            except (CannotRun, ImplUnavailable) as error:
                rows[name] = {"cannot_run": str(error).splitlines()[0]}
            except Exception as error:  # the others may run
                rows[name] = {"failed": in_one_line(error)}
        times: dict[str, list[float]] = {name: [] for name in (*ready, "copy", "product")}
        self.clocks.taken()
        for _ in range(self._rounds):
            for name, timed in (*ready.items(), ("copy", self._copy), ("product", self._product)):
                times[name].append(timed.milliseconds(self.clocks))
        copy = self._copy_bytes / median(times["copy"]) / 1e6
        product = self._product_flops / median(times["product"]) / 1e9
        for name, timed in ready.items():
            ms = median(times[name])
            rate = group.floor_bytes / ms / 1e6
            rows[name] = {"ms": ms, "range_ms": [min(times[name]), max(times[name])], "timing": timed.timing}
            rows[name] |= {"calls": timed.calls, "gb_per_s": rate, "share_of_copy": rate / copy}
            if group.flops:
                rows[name]["share_of_matmul"] = group.flops / ms / 1e9 / product
        return {
            **machine(),
            "dtype": str(DTYPE).removeprefix("torch."),
            "floor_bytes": group.floor_bytes,
            "copy_gb_per_s": copy,
            "matmul_tflop_per_s": product,
            "l2": _l2(group.floor_bytes, 1 + len(copies)),
            "clocks": self.clocks.taken(),
            "rows": {name: rows[name] for name in group.contenders},
        }

    def record(
        self, benchmark: Any, group: Group, kernels: Callable[[Contender], list[str]] | None = None
    ) -> None:
        """Put the group into pytest-benchmark's extra_info; its own number is one call of the first contender.

        `kernels` names the kernels that a contender ran. The result is appended to the file in VGLANN_BENCH_JSONL,
        too: pytest-benchmark writes when all is done. Raises AssertionError after that where a contender failed.
        """
        info = self.group(group)
        for name, row in info["rows"].items():
            if kernels and "ms" in row:
                row["kernels"] = kernels(group.contenders[name])
        benchmark.extra_info.update(info)
        if VARIABLE in os.environ:
            append_line(Path(os.environ[VARIABLE]), {"group": benchmark.name, **info})
        benchmark.pedantic(next(iter(group.contenders.values()))(), rounds=1, iterations=1)
        failed = {name: row["failed"] for name, row in info["rows"].items() if "failed" in row}
        assert not failed, failed


def append_line(path: Path, result: dict[str, Any]) -> None:
    """Append a result to a file of JSON lines and sync it: it is kept, whatever happens next."""
    with path.open("a") as out:
        out.write(json.dumps(result) + "\n")
        out.flush()
        os.fsync(out.fileno())


def machine() -> dict[str, str]:
    """Return the device and the versions that a time depends on."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU (small shapes)"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {"device": name, "torch": torch.__version__, "triton": triton}


def in_one_line(error: Exception) -> str:
    """Return the name and the start of the message of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def copies_beyond_l2(floor_bytes: int) -> int:
    """Return the number of copies of a group that together are more than three times L2; one without a GPU."""
    if DEVICE == "cpu":
        return 1
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(MAX_CALLS, math.ceil(3 * size / floor_bytes)))


def _l2(floor_bytes: int, copies: int) -> str:
    """Return the state of the cache in words."""
    if DEVICE == "cpu":
        return "caches warm"
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    inputs = "the same inputs" if copies == 1 else f"{copies} copies of the inputs"
    held = "fits in" if copies * floor_bytes <= size else "is more than"
    return f"calls in a row on {inputs}; {copies * floor_bytes / 1e6:.0f} MB {held} L2 ({size / 1e6:.0f} MB)"


def disagreements(group: Group) -> dict[str, str]:
    """Return what is wrong with each contender that gives another result than the first one.

    What one that raises said is wrong, too. One that cannot run here is not named, and None is not compared.
    """
    expected: list[Tensor] = []
    wrong = {}
    for name, contender in group.contenders.items():
        try:
            values = contender()()
        except (CannotRun, ImplUnavailable):
            continue
        except Exception as error:  # the others may run
            wrong[name] = in_one_line(error)
            continue
        if values is None:
            continue
        values = [v.detach().double() for v in ([values] if isinstance(values, Tensor) else values)]
        expected = expected or values
        off = [
            float((value - right).norm() / right.norm())
            for value, right in zip(values, expected, strict=True)
            if not (value - right).norm() <= group.tolerance * right.norm()
        ]
        if off:
            wrong[name] = f"differs from the first contender: relative L2 {max(off):.2e}"
    return wrong
