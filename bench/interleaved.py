"""Time the contenders of a group in turns, on the device, and say what the times mean.

Without a GPU the times are of the host clock and the shapes small; the Triton rows then say why they cannot run.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from vglann_kernels import ImplUnavailable

ROUNDS, WARM_UP = 7, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(15, 32, 64), (256, 32, 64)] if DEVICE == "cuda" else [(1, 4, 64)]  # videos, frames, size
Contender = Callable[[], Any]


def milliseconds(call: Contender) -> float:
    """One call: device time between two events, or host time without a GPU. L2 is as the call before left it."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def copy_bandwidth(megabytes: int = 1024 if DEVICE == "cuda" else 64) -> float:
    """GB/s of a copy in this run, bytes read plus bytes written."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(ROUNDS)]
    return 2 * source.numel() / median(times) / 1e6


def interleaved(contenders: dict[str, Contender], floor_bytes: int) -> dict[str, dict[str, Any]]:
    """name -> {"ms", "gb_per_s", "share_of_copy"} or {"cannot_run": why}; all in turns, the median of the rounds.

    The share is the bytes the op must move over its time, over the bandwidth of a copy in the same run.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, call in contenders.items():
        try:
            for _ in range(WARM_UP):
                call()
        except (ImplUnavailable, ValueError, RuntimeError) as error:
            rows[name] = {"cannot_run": str(error).splitlines()[0]}
    runnable = {name: call for name, call in contenders.items() if name not in rows}
    times: dict[str, list[float]] = {name: [] for name in runnable}
    for _ in range(ROUNDS):
        for name, call in runnable.items():
            times[name].append(milliseconds(call))
    copy = copy_bandwidth()
    for name in runnable:
        ms = median(times[name])
        rate = floor_bytes / ms / 1e6
        rows[name] = {"ms": ms, "gb_per_s": rate, "share_of_copy": rate / copy}
    return rows


def record(
    benchmark: Any, contenders: dict[str, Contender], floor_bytes: int, timed: str = "reference"
) -> None:
    """Put the interleaved medians into pytest-benchmark's extra_info; reports read nothing else."""
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        torch=torch.__version__,
        floor_bytes=floor_bytes,
        rows=interleaved(contenders, floor_bytes),
    )
    benchmark.pedantic(contenders[timed], rounds=1, iterations=1)


def agree(contenders: dict[str, Callable[[], torch.Tensor]], tolerance: float) -> None:
    """Every contender that can run gives the value of the first, relative L2."""
    expected = None
    for name, call in contenders.items():
        try:
            value = call().detach().double()
        except (ImplUnavailable, ValueError):
            continue
        expected = value if expected is None else expected
        assert (value - expected).norm() <= tolerance * expected.norm(), name
