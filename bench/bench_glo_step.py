"""The whole training step, from the author's to the fastest, one change at a time.

    python bench/bench_glo_step.py --clips CLIPS [--batch 15] [--width 64] [--steps 5] [--device cpu]
                                   [--json FILE.jsonl] [--same-process]
    pytest bench/bench_glo_step.py --benchmark-only

The first prints the waterfall, each row in a process of its own on the same clips and with the same loss (preset
`paper`); a row that cannot run says why, and exit code 1 tells that a row failed. Band matrices of the PyTorch
reference are kept: made in each step, they would flatter the kernels. --same-process saves the starts of the
processes. --json appends a line for each row as soon as it is known. The second compares the author's step with ours,
in turns in one process, at the size given by VGLANN_BENCH_CLIPS, VGLANN_BENCH_BATCH and VGLANN_BENCH_WIDTH, small by
default.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from vglann_kernels import ImplUnavailable
from vglann_kernels.impl import using_impl

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.pixels import psnr, to_uint8
from vglann_fast.errors import VglannError

# This file is a script and a pytest module: neither finds its neighbors by itself.
from vglann_fast.experiments.step_rows import ROWS, WARM_UP, Step, author_and_ours, open_clips, seconds_of
from vglann_fast.experiments.timing import append_line, in_one_line, keep_band_matrices, machine
from vglann_fast.glo.precision import training_numerics
from vglann_fast.glo.training import Training
from vglann_fast.runtime.memory import forget_peak, peak_memory
from vglann_fast.runtime.numerics import numerics


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-add rate of a large matrix product in this run, in FLOP/s."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    rounds = 5 if device.type == "cuda" else 2
    times = [seconds_of(lambda: (a @ a)[0, 0], device)[0] for _ in range(rounds)]
    return 2 * n**3 / min(times)


def generator_flops(width: int, batch: int) -> float:
    """Of forward and backward of `batch` videos: 4.51 GFLOP forward each at width 64, thrice that with backward."""
    share = width / 64
    return (
        3 * batch * (3.97e9 * share**2 + 0.54e9 * share)
    )  # the head grows with the width, the rest with its square


def launches(step: Step, number: int, device: torch.device) -> int | None:
    """Kernels and graphs launched by one step on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        seconds_of(lambda: step(number), device)
    return sum(
        event.count
        for event in found.key_averages()
        if "LaunchKernel" in event.key or "GraphLaunch" in event.key
    )


def measure_row(
    name: str, clips: ClipSet, batch: int, width: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """One row of the waterfall. A row that cannot run has "why_not" alone."""
    changes, kernels = ROWS[name]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    forget_peak(device)
    try:
        with using_impl(kernels or None):
            author, ours, training = author_and_ours(clips, batch, width, device, changes)
            with training_numerics(training.options, device):
                return _measured_row(name, author if name == "author" else ours, training, steps)
    except (VglannError, ImplUnavailable) as error:
        return {"row": name, "why_not": " ".join(str(error).split())}
    except Exception as error:  # the other rows may run
        return {"row": name, "failed": in_one_line(error)}


def measure_in_a_process(name: str) -> dict[str, Any]:
    """`measure_row` in a process of its own, with the arguments of this one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
    return json.loads(last[0]) if last else {"row": name, "failed": f"exit code {done.returncode}"}


def append(path: Path, row: dict[str, Any], batch: int) -> None:
    """Append a row to a file of results, which `report.py` reads."""
    values = {key: value for key, value in row.items() if key not in ("row", "why_not")}
    if "why_not" in row:
        values["cannot_run"] = row["why_not"]
    append_line(path, {"group": f"step {batch}", **machine(), "rows": {row["row"]: values}})


def _measured_row(name: str, step: Step, training: Training, steps: int) -> dict[str, Any]:
    device, batch, width = training.device, training.batch_size, training.options.width
    losses, times = [], []
    for number in range(WARM_UP + steps):
        seconds, loss = seconds_of(lambda number=number: step(number), device)
        losses.append(loss)
        times.append(seconds)
    count = launches(step, WARM_UP + steps, device)
    seconds = median(times[WARM_UP:])
    half = training.precision == "bf16"
    rate = matmul_rate(device, torch.bfloat16 if half else torch.float32)
    return {
        "row": name,
        "ms": 1e3 * seconds,
        "videos_per_second": batch / seconds,
        "launches": count,
        "peak_gb": peak_memory(device) / 1e9,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "matmul_share": generator_flops(width, batch) / seconds / rate,
        "psnr": None if name == "author" else _psnr(training),
    }


@torch.no_grad()
def _psnr(training: Training) -> float:
    rows = np.arange(training.batch_size)
    at = torch.from_numpy(rows).to(training.device)
    training.generator.train()
    video = training.generator(training.latents.rows[at]).float()
    real = torch.from_numpy(training.clips.read(rows)).to(training.device)
    return psnr(to_uint8(video, training.options.target_limits), real).mean().item()


def table(rows: list[dict[str, Any]]) -> str:
    """The waterfall in Markdown; the last column is against the author's step."""
    lines = [
        "| step | ms | videos/s | launches | peak GB | loss, first and last | PSNR | of matmul rate | times |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = rows[0].get("ms")
    for row in rows:
        if "ms" not in row:
            lines.append(f"| {row['row']} | {row.get('why_not') or row['failed']} | | | | | | | |")
            continue
        times = f"{base / row['ms']:.2f}" if base else ""
        quality = "" if row["psnr"] is None else f"{row['psnr']:.2f}"
        lines.append(
            f"| {row['row']} | {row['ms']:.1f} | {row['videos_per_second']:.1f} | {row['launches'] or ''} | "
            f"{row['peak_gb']:.2f} | {row['first_loss']:.4f} {row['last_loss']:.4f} | {quality} | "
            f"{row['matmul_share']:.1%} | {times} |"
        )
    return "\n".join(lines)


def test_step_against_the_author(benchmark):
    """In turns, so that a busy machine is busy for both; the loss is compared first."""
    batch = int(os.environ.get("VGLANN_BENCH_BATCH", "4"))
    width = int(os.environ.get("VGLANN_BENCH_WIDTH", "16"))
    clips = open_clips(os.environ.get("VGLANN_BENCH_CLIPS"), batch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    author, fp32, _ = author_and_ours(clips, batch, width, device, {"precision": "fp32"})
    _, bf16, _ = author_and_ours(clips, batch, width, device, {"precision": "bf16"})
    steps = {"author": author, "fp32": fp32, "bf16": bf16}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + 5):
        losses = {}
        for name, step in steps.items():
            with numerics(tf32=False):
                seconds, losses[name] = seconds_of(lambda step=step, number=number: step(number), device)
            times[name].append(seconds)
        if number < 2:  # later, rounding grows: Adam divides by small second moments
            assert abs(losses["fp32"] / losses["author"] - 1) < (1e-5, 1e-3)[number]
            assert abs(losses["bf16"] / losses["author"] - 1) < 0.01
    medians = {name: 1e3 * median(values[WARM_UP:]) for name, values in times.items()}
    benchmark.extra_info |= {
        "batch": batch,
        "width": width,
        "device": str(device),
        "ms": medians,
        "times_faster": {name: medians["author"] / ms for name, ms in medians.items()},
    }
    benchmark.pedantic(lambda: fp32(WARM_UP + 5), rounds=1)


def main() -> int:
    """Print the waterfall and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", help="clip folder; default: made up")
    parser.add_argument("--batch", type=int, default=15)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="measured, after 2 that are not")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--one", choices=ROWS, help="measure this row here and print it as JSON")
    parser.add_argument("--same-process", action="store_true", help="measure all rows in this process")
    parser.add_argument("--json", type=Path, metavar="FILE.jsonl", help="append each row to this file")
    a = parser.parse_args()
    keep_band_matrices()
    clips = open_clips(a.clips, a.batch) if a.one or a.same_process else None
    if a.one:
        print(json.dumps(measure_row(a.one, clips, a.batch, a.width, a.steps, torch.device(a.device))))
        return 0
    rows = []
    for name in a.rows:
        if a.same_process:
            row = measure_row(name, clips, a.batch, a.width, a.steps, torch.device(a.device))
        else:
            row = measure_in_a_process(name)
        rows.append(row)
        if a.json:
            append(a.json, row, a.batch)
        print(f"{name}: {row.get('why_not') or row.get('failed') or row['ms']}", file=sys.stderr, flush=True)
    print(table(rows))
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
