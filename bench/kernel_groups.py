"""Time the few groups of kernels that a short session with a GPU is for, the most useful ones first.

    python bench/kernel_groups.py OUT.jsonl [GROUP ...] [--once]

appends one JSON line for each group as soon as it is known, and syncs it: {"group", "seconds"} and what
`Timing.group` returns, or {"group", "failed"}. Groups of 15 videos fit in L2, so their calls take turns on copies of
the inputs. Exit code 1 when a group or a contender failed. After an error that leaves the GPU unusable the remaining
groups run in a new process.

--once calls every contender but the compiled ones once and times nothing: for a profiler, under which compiling would
take the time that it has.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_batchnorm_relu
import bench_composite
import bench_composite_laplacian
import bench_laplacian
import bench_latent_adam
import bench_step_guard
import bench_upsample_conv
import torch

from vglann_fast.experiments.timing import (
    DEVICE,
    Group,
    Timing,
    append_line,
    copies_beyond_l2,
    disagreements,
    in_one_line,
    keep_band_matrices,
    machine,
)

LARGE, SMALL = 256, 15
LAYOUT = "channels-last"
ROUNDS = 5


def shape(batch: int) -> tuple[int, int, int]:
    """Return (videos, frames, size) of a group; tiny without a GPU."""
    return (batch, 32, 64) if DEVICE == "cuda" else (1, 2, 32)


def loss_groups(batch: int) -> dict[str, Callable[[], Group]]:
    """Return the groups of the two losses, each with the forward and the backward pass."""
    return {
        f"laplacian full {batch}": lambda: bench_laplacian.group(shape(batch), LAYOUT, "full"),
        f"composite_laplacian full {batch}": lambda: bench_composite_laplacian.group(
            shape(batch), LAYOUT, "full"
        ),
    }


def composite_groups(batch: int) -> dict[str, Callable[[], Group]]:
    """Return the groups of `mask_composite`."""
    return {
        f"composite {mode} {batch}": lambda mode=mode: bench_composite.group(shape(batch), LAYOUT, mode)
        for mode in ("fwd", "bwd")
    }


def latent_group(batch: int) -> dict[str, Callable[[], Group]]:
    """Return the group of the latents' step."""
    return {f"latent_adam sparse {batch}": lambda: bench_latent_adam.group(batch, "sparse")}


def norm_group(batch: int) -> dict[str, Callable[[], Group]]:
    """Return the group of the video stream's largest BatchNorm with its ReLU."""

    def group() -> Group:
        found = bench_batchnorm_relu.group(shape(batch), "norm4", LAYOUT, "full")
        contenders = {name: found.contenders[name] for name in ("reference", "triton")}
        return replace(found, contenders=contenders)

    return {f"batchnorm_relu norm4 full {batch}": group}


def convolution_groups(batch: int) -> dict[str, Callable[[], Group]]:
    """Return the groups of the two narrow transposed convolutions of the video stream."""
    return {
        f"upsample_conv {layer} full {batch}": lambda layer=layer: bench_upsample_conv.group(
            shape(batch)[0], layer, "full"
        )
        for layer in ("conv4", "head")
    }


GROUPS = {
    **loss_groups(LARGE),
    **loss_groups(SMALL),
    **composite_groups(LARGE),
    **composite_groups(SMALL),
    **latent_group(SMALL),
    **latent_group(LARGE),
    **norm_group(LARGE),
    **norm_group(SMALL),
    f"step_guard {SMALL}": lambda: bench_step_guard.group(SMALL),
    f"composite_laplacian paper full {LARGE}": lambda: bench_composite_laplacian.group(
        shape(LARGE), LAYOUT, "full", "paper"
    ),
    **convolution_groups(LARGE),
    **convolution_groups(SMALL),
}
# torch.compile takes seconds a group.
COMPILED = {f"laplacian full {LARGE}", f"composite_laplacian full {LARGE}"}


def without_compile(name: str) -> Group:
    """Return a group without the contenders of torch.compile."""
    group = GROUPS[name]()
    contenders = {key: call for key, call in group.contenders.items() if "compile" not in key}
    return replace(group, contenders=contenders)


def made(name: str) -> Group:
    """Return a group; without torch.compile unless the group is named in COMPILED."""
    return GROUPS[name]() if name in COMPILED else without_compile(name)


def measured(name: str, times: Timing) -> dict[str, Any]:
    """Return the result of a group; {"failed": why} where there is none."""
    try:
        group = made(name)
        # A compiled contender would be compiled again for each copy, and the large groups are larger than L2.
        count = (
            1
            if name in COMPILED or name.startswith(("latent", "step"))
            else copies_beyond_l2(group.floor_bytes)
        )
        return times.group(group, *(made(name) for _ in range(count - 1)))
    except Exception as error:  # the next group may still run
        return {**machine(), "failed": in_one_line(error)}


def is_usable() -> bool:
    """Return False after an error that no later call on the GPU survives, such as an illegal access."""
    if DEVICE == "cpu":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def failures(result: dict[str, Any]) -> dict[str, str]:
    """Return what failed in a result: contender, or "group" -> why."""
    failed = {name: row["failed"] for name, row in result.get("rows", {}).items() if "failed" in row}
    return failed | ({"group": result["failed"]} if "failed" in result else {})


def main() -> int:
    """Time the groups and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="default: all; " + ", ".join(GROUPS))
    parser.add_argument("--once", action="store_true")
    a = parser.parse_args()
    names = a.groups or list(GROUPS)
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        parser.error(f"no group {', '.join(unknown)}; choose from {', '.join(GROUPS)}")
    if a.once:
        wrong = {name: off for name in names if (off := disagreements(without_compile(name)))}
        print(wrong or "all contenders agree")
        return 1 if wrong else 0
    keep_band_matrices()
    times = Timing(ROUNDS)
    for number, name in enumerate(names, 1):
        started = time.perf_counter()
        result = measured(name, times)
        line = {"group": name, "seconds": time.perf_counter() - started, **result}
        append_line(a.out, line)
        for contender, row in result.get("rows", {}).items():
            print(f"{name}, {contender}: {row.get('ms', row)}", flush=True)
        if "failed" in result:
            print(f"{name}: {result['failed']}", flush=True)
        if not is_usable():
            if names[number:]:
                os.execv(sys.executable, [sys.executable, __file__, str(a.out), *names[number:]])
            return 1
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    # Read from the file, so that what failed in an earlier process counts.
    return 1 if any(failures(json.loads(line)) for line in a.out.read_text().splitlines()) else 0


if __name__ == "__main__":
    sys.exit(main())
