"""Seconds to reach a reconstruction PSNR: preset `paper` by its author's step and by ours, and preset `modern-2026a`,
which was called `modern` when the study was made.

    python -m vglann_fast.experiments.time_to_quality CLIPS RUNS OUT

RUNS are those of `ablation.py train`; the result is OUT/ablation_quality.json.

Steps come from the trainings of the ablation, seconds a step from the steps timed here: in turns in one process of
one thread, by its CPU time, so that what else the machine does hardly counts. The author's step computes what
preset `paper` does (bench_glo_step checks the loss), so it needs the same number of steps. The PSNR of an epoch is
the mean over its batches, each as the step saw it: all clips once, but for those left over, with BatchNorm by
batch, while the weights move.

{"format": "vglann-time-to-quality", "version": 1, "steps_per_epoch", "targets": [dB], "rows": [{"row",
"ms": a step, "seeds": [{"seed", "psnr": [of each epoch], "steps": [to each target, or null]}]}]}
"""

import argparse
import logging
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.experiments.ablation import (
    ENDS,
    SEEDS,
    TIMED,
    WARM_UP,
    PlannedTraining,
    finished,
    options_of,
)
from vglann_fast.experiments.step_rows import Step, author_and_ours
from vglann_fast.glo.assemble import new_training
from vglann_fast.run.files import write_json
from vglann_fast.run.folder import RunDir

TARGETS = (15.0, 16.0, 17.0)
AUTHOR = "paper, author's step"


def psnr_by_epoch(run: RunDir, steps_per_epoch: int) -> list[float]:
    """The mean PSNR of the batches of each epoch, from a run that logged every step."""
    found = [row["psnr"] for row in run.logs.metrics("glo")]
    epochs = range(0, len(found), steps_per_epoch)
    return [sum(found[at : at + steps_per_epoch]) / steps_per_epoch for at in epochs]


def steps_to(target: float, psnr: list[float], steps_per_epoch: int) -> int | None:
    """Steps at the end of the first epoch whose PSNR is at least `target`; None if there is none."""
    reached = (epoch for epoch, value in enumerate(psnr, start=1) if value >= target)
    epoch = next(reached, None)
    return None if epoch is None else epoch * steps_per_epoch


def milliseconds(clips: ClipSet) -> dict[str, float]:
    """Of one step of each row: the median, timed in turns."""
    torch.set_num_threads(1)
    options = options_of("paper")
    author, paper, training = author_and_ours(
        clips, options.batch_size, options.width, torch.device("cpu"), {"precision": "fp32"}
    )
    modern = new_training(clips, options_of("modern"), training.run)
    steps: dict[str, Step] = {
        AUTHOR: author,
        "paper": paper,
        "modern": lambda number: modern.train_step(with_video=False)[0],
    }
    times: dict[str, list[float]] = {row: [] for row in steps}
    for number in range(WARM_UP + TIMED):
        for row, step in steps.items():
            started = time.process_time()
            step(number)
            times[row].append(time.process_time() - started)
    return {row: 1e3 * median(values[WARM_UP:]) for row, values in times.items()}


def table(record: dict[str, Any]) -> str:
    """Markdown: a line for each row; the median of the seeds, in seconds, with their range."""
    heads = [f"{target:g} dB" for target in record["targets"]]
    lines = [
        f"| training | step, ms | {' | '.join(heads)} | last epoch, dB |",
        "|---" * (len(heads) + 3) + "|",
    ]
    for row in record["rows"]:
        steps = zip(*(seed["steps"] for seed in row["seeds"]), strict=True)
        cells = [_seconds(list(one), row["ms"]) for one in steps]
        last = [seed["psnr"][-1] for seed in row["seeds"]]
        lines.append(
            f"| {row['row']} | {row['ms']:.0f} | {' | '.join(cells)} | {min(last):.2f} to {max(last):.2f} |"
        )
    return "\n".join(lines)


def _seconds(steps: list[int | None], ms: float) -> str:
    found = sorted(step * ms / 1e3 for step in steps if step is not None)
    if len(found) < len(steps):
        return "not reached" if not found else f"in {len(found)} of {len(steps)} seeds"
    spread = f" ({found[0]:.0f} to {found[-1]:.0f})" if len(found) > 1 else ""
    return f"{median(found):.0f}{spread}"


def main() -> None:
    """Time, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("clips", "runs", "out"):
        parser.add_argument(name, type=Path)
    a = parser.parse_args()
    clips = ClipSet.open(a.clips, "train")
    per_epoch = len(clips) // options_of("paper").batch_size
    seeds: dict[str, list[dict[str, Any]]] = {row: [] for row in ENDS}
    for row in ENDS:
        for seed in SEEDS:
            folder = a.runs / PlannedTraining(row, "short", seed).folder
            if finished(folder):
                psnr = psnr_by_epoch(RunDir.open(folder), per_epoch)
                steps = [steps_to(target, psnr, per_epoch) for target in TARGETS]
                seeds[row].append({"seed": seed, "psnr": psnr, "steps": steps})
    seeds[AUTHOR] = seeds["paper"]
    rows = [{"row": row, "ms": ms, "seeds": seeds[row]} for row, ms in milliseconds(clips).items()]
    record = {"format": "vglann-time-to-quality", "version": 1, "steps_per_epoch": per_epoch}
    record |= {"targets": list(TARGETS), "rows": rows}
    write_json(a.out / "ablation_quality.json", record)
    print(table(record))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # progress
    main()
