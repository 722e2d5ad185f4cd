"""Time the contenders of a group in turns, on the device, and say what the times mean.

On a GPU `n` calls are captured in a CUDA graph and its replay is timed between two events, so that the gaps between
launches do not count. A contender that cannot be captured (it waits for the host) is timed between events as it is,
and its row says so. The calls follow each other on the same inputs: L2 holds what fits of them.
Without a GPU the times are of the host clock and the shapes small; the Triton rows then say why they cannot run.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from vglann_kernels.laplacian import reference as laplacian_reference

from vglann_fast.experiments.clocks import Clocks

ROUNDS, WARM_UP = 7, 2
MAX_CALLS, WANTED_MS = 20, 2.0  # of a graph: calls, and the time they should fill
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = [(15, 32, 64), (256, 32, 64)] if DEVICE == "cuda" else [(1, 4, 64)]  # videos, frames, size
LAYOUTS = {"contiguous": False, "channels-last": True}
MODES = ("fwd", "bwd", "full")
Call = Callable[[], Any]
Contender = Callable[[], Call]  # does what is not timed, and gives one call that is


class CannotRun(RuntimeError):
    """A contender cannot run here; the message says why."""


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
    """Make the band matrices of the eager loss once: made anew at each call they would flatter ours."""
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
    """A contender, warmed up and, on a GPU, captured. `timing` says how it is timed, `calls` how many at once."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        for _ in range(WARM_UP):
            contender()()
        once = between_events(contender())
        self.calls = max(1, min(MAX_CALLS, round(WANTED_MS / max(once, 1e-3))))
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
            self._contender()()
            self._held = [self._contender() for _ in range(self.calls)]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in self._held:
                call()
        graph.replay()
        torch.cuda.synchronize()
        self._graph = graph

    def milliseconds(self, clocks: Clocks) -> float:
        """Of one call, the mean of `calls` in a row."""
        if self._graph is not None:
            return between_events(self._graph.replay, clocks) / self.calls
        calls = [self._contender() for _ in range(self.calls)]

        def work() -> None:
            for call in calls:
                call()

        return between_events(work, clocks) / self.calls


class Timing:
    """One a session: the two ceilings, timed in turns with each group, and the clocks.

    A copy (bytes read plus bytes written) and a product of square matrices, of random numbers: zeros are faster.
    """

    def __init__(self) -> None:
        self.clocks = Clocks()
        megabytes, n = (1024, 8192) if DEVICE == "cuda" else (32, 512)
        source = torch.randint(0, 256, (megabytes << 20,), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
        self._copy_bytes, self._product_flops = 2 * source.numel(), 2 * n**3
        self._copy = Timed(lambda: lambda: target.copy_(source))
        self._product = Timed(lambda: lambda: a @ b)

    def group(self, contenders: dict[str, Contender], floor_bytes: int, flops: int = 0) -> dict[str, Any]:
        """Everything that reports read: the rows by contender, the ceilings, clocks, versions and the state of L2.

        Args:
            floor_bytes: what the op must move: each input read once, each output written once.
            flops: what it does on the matrix units, if anything.

        A row is {"ms", "range_ms", "timing", "calls", "gb_per_s", "share_of_copy"[, "share_of_matmul"]}, the median
        of the rounds, or {"cannot_run": why}.
        """
        rows: dict[str, dict[str, Any]] = {}
        ready: dict[str, Timed] = {}
        for name, contender in contenders.items():
            try:
                ready[name] = Timed(contender)
            except (ValueError, RuntimeError) as error:
                rows[name] = {"cannot_run": str(error).splitlines()[0]}
        times: dict[str, list[float]] = {name: [] for name in (*ready, "copy", "product")}
        self.clocks.taken()
        for _ in range(ROUNDS):
            for name, timed in (*ready.items(), ("copy", self._copy), ("product", self._product)):
                times[name].append(timed.milliseconds(self.clocks))
        copy = self._copy_bytes / median(times["copy"]) / 1e6
        product = self._product_flops / median(times["product"]) / 1e9
        for name, timed in ready.items():
            ms = median(times[name])
            rate = floor_bytes / ms / 1e6
            rows[name] = {"ms": ms, "range_ms": [min(times[name]), max(times[name])], "timing": timed.timing}
            rows[name] |= {"calls": timed.calls, "gb_per_s": rate, "share_of_copy": rate / copy}
            if flops:
                rows[name]["share_of_matmul"] = flops / ms / 1e9 / product
        return {
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU (small shapes)",
            "torch": torch.__version__,
            "dtype": str(DTYPE).removeprefix("torch."),
            "floor_bytes": floor_bytes,
            "copy_gb_per_s": copy,
            "matmul_tflop_per_s": product,
            "l2": _l2(floor_bytes),
            "clocks": self.clocks.taken(),
            "rows": {name: rows[name] for name in contenders},
        }

    def record(
        self, benchmark: Any, contenders: dict[str, Contender], floor_bytes: int, flops: int = 0
    ) -> None:
        """Put the group into pytest-benchmark's extra_info; its own number is one call of the first contender."""
        benchmark.extra_info.update(self.group(contenders, floor_bytes, flops))
        benchmark.pedantic(next(iter(contenders.values()))(), rounds=1, iterations=1)


def _l2(floor_bytes: int) -> str:
    """The state of the cache in words."""
    if DEVICE == "cpu":
        return "caches warm"
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    held = "fits in" if floor_bytes <= size else "is more than"
    return (
        f"warm: calls in a row on the same inputs; {floor_bytes / 1e6:.0f} MB {held} L2 ({size / 1e6:.0f} MB)"
    )


def agree(contenders: dict[str, Contender], tolerance: float) -> None:
    """Every contender that can run gives what the first gives: each tensor within `tolerance`, relative L2."""
    expected: list[Tensor] = []
    for name, contender in contenders.items():
        try:
            values = contender()()
        except (ValueError, RuntimeError):
            continue  # its row will say why
        values = [v.detach().double() for v in ([values] if isinstance(values, Tensor) else values)]
        expected = expected or values
        for value, right in zip(values, expected, strict=True):
            assert (value - right).norm() <= tolerance * right.norm(), name
