"""Ablation of the paper's reconstructions: from preset `paper` to preset `modern-2026a`, one change at a time.

    vglann clips fetch L                                # the film; prints the folder
    vglann clips pack FOLDER/bbb.mp4 --out CLIPS        # split by shot
    python -m vglann_fast.experiments.ablation train CLIPS RUNS       # 18 trainings and some variants
    python -m vglann_fast.experiments.ablation measure CLIPS RUNS OUT # writes OUT/ablation.json
    python -m vglann_fast.experiments.ablation time CLIPS OUT         # writes OUT/ablation_time.json

Two regimes. "short" is training as it is: an epoch of the clips at hand, some dozen steps. "long" adds what an
epoch of the paper's 50,000 clips does to the latents: between two real steps come K = round(50000 / N) - 1 Adam
steps over the latent table with a gradient of zero, which is what dense Adam does to a row while other clips have
their turn. Moments, step counts, bias correction and the renormalization at the epoch's end are then as in a long
epoch. What it leaves out: the generator takes the real steps alone, so it neither learns from the other clips nor
moves on between two visits of a clip. Row-wise Adam leaves rows outside the batch as they are, so its rows are the
same in both regimes and are trained once.

ablation.json: {"format": "vglann-ablation", "version": 1, "clips": {"train", "batch_size", "idle_steps"}, "runs":
[{"row", "regime", "seed", "batchnorm", "steps", "psnr", ...}]}: the mean over all training clips of each measure of
`metrics/reconstruction.py`, BatchNorm in the row's own mode.
"""

import argparse
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.batchnorm import recompute_batchnorm
from vglann_fast.glo.checkpoint import Trained, load_trained
from vglann_fast.glo.latents import LatentTable
from vglann_fast.glo.loader import Batch
from vglann_fast.glo.precision import training_numerics
from vglann_fast.glo.training import Training
from vglann_fast.metrics.reconstruction import means_of, reconstruction_metrics
from vglann_fast.options.fields import options_to_json
from vglann_fast.options.presets import PRESETS
from vglann_fast.options.training import TrainOptions
from vglann_fast.run.files import read_json, write_json
from vglann_fast.run.folder import RunDir
from vglann_fast.samples.sample import render

# Options without effect on the trainings here: they matter to what comes after one, or to another generator or loss.
UNUSED: dict[str, Any] = {"batchnorm": "eval", "reuse_norms": False, "perceptual": "fixed"}
# Row -> what it changes in the row before it. The first is preset `paper`, the last preset `modern-2026a`.
CHANGES: dict[str, dict[str, Any]] = {
    "paper": {},
    "+ schedule": {"schedule": "cosine"},
    "+ range": {"target_range": "symmetric"},
    "+ all frames": {"frame_reduction": "mean"},
    "+ Adam state kept": {"adam_state": "keep"},
    "+ row-wise latents": {"latent_mode": "sparse", "latent_norm": "projected", "latent_init": "sphere"},
    "+ Laplacian kernel": {"blur": "binomial"},
    "+ statistics anew": UNUSED,
    "+ PCA start": {"latent_init": "pca"},
    "modern-2026a": {"lr_generator": 0.002, "lr_latents": 0.03},
}
ENDS = ("paper", "modern-2026a")
# What else was tried: one seed, short epochs.
VARIANTS: dict[str, dict[str, Any]] = {"modern-2026a, Z 0.01": {"lr_latents": 0.01}}
ROWS = (*CHANGES, *VARIANTS)
REGIMES, SEEDS = ("short", "long"), (0, 1, 2)
WIDTH, EPOCHS = 32, 20
LONG_EPOCH = 50_000  # clips of the paper's training set
WARM_UP, TIMED = 2, 7  # steps of each row in `time`


class PlannedTraining(NamedTuple):
    """One line of the study: a row in a regime, with a seed."""

    row: str
    regime: str
    seed: int

    @property
    def folder(self) -> str:
        """The run folder of its training. Lines share one where idle steps do nothing, with row-wise latents."""
        row = next(row for row in reversed(ROWS) if same_training(row, self.row))
        regime = self.regime if options_of(row).latent_mode == "dense" else "short"
        name = "".join(c if c.isalnum() else "-" for c in row.lower()).strip("-")
        return f"{name}.{regime}.{self.seed}"


def options_of(row: str) -> TrainOptions:
    """The options of a row: the options of all rows up to it, at the size of this study."""
    options = PRESETS["modern-2026a" if row in VARIANTS else "paper"].train
    if row in VARIANTS:
        options = replace(options, **VARIANTS[row])
    else:
        for name, changes in CHANGES.items():
            options = replace(options, **changes)
            if name == row:
                break
    return replace(options, width=WIDTH, epochs=EPOCHS)


def same_training(one: str, other: str) -> bool:
    """Return True if the trainings of two rows are one and the same."""
    return replace(options_of(one), **UNUSED) == replace(options_of(other), **UNUSED)


def plan() -> list[PlannedTraining]:
    """All lines of the study, the most wanted first."""
    ends = [[PlannedTraining(row, regime, seed) for regime in REGIMES for row in ENDS] for seed in SEEDS]
    middle = [PlannedTraining(row, regime, SEEDS[0]) for regime in REGIMES for row in CHANGES]
    variants = [PlannedTraining(row, "short", SEEDS[0]) for row in VARIANTS]
    return list(dict.fromkeys([*ends[0], *middle, *ends[1], *ends[2], *variants]))


class LongEpochTraining(Training):
    """A training whose latents pass through the steps of an epoch of many more clips; see the top of this file."""

    def train_step(self, *, with_video: bool = True) -> tuple[Tensor, Tensor | None, Batch]:
        """The next step, before it the idle ones that part it from the one before."""
        if self.position:
            idle(self.latents, idle_steps(len(self.clips)))
        return super().train_step(with_video=with_video)


def idle(latents: LatentTable, steps: int) -> None:
    """Adam steps of the table in which no row has a gradient."""
    nobody = torch.zeros(0, dtype=torch.int64, device=latents.rows.device)
    nothing, skip = latents.rows[:0], torch.zeros((), dtype=torch.bool, device=latents.rows.device)
    for _ in range(steps):
        latents.step(nobody, nothing, skip)


def idle_steps(clips: int) -> int:
    """Idle steps between two real ones, so that an epoch of `clips` takes as many as one of `LONG_EPOCH`."""
    return round(LONG_EPOCH / clips) - 1


def train_all(clips_folder: Path, runs: Path, only: list[str]) -> None:
    """Train what is planned and not finished; a training that was stopped is resumed."""
    clips = ClipSet.open(clips_folder, "train")
    for wanted in plan():
        folder = runs / wanted.folder
        if (only and folder.name not in only) or finished(folder):
            continue
        started = time.monotonic()
        train_one(wanted, clips, folder, clips_folder)
        print(f"{folder.name}: {time.monotonic() - started:.0f} s", flush=True)


def finished(folder: Path) -> bool:
    """Return True if a training was taken to its end."""
    begun = (folder / "options.json").is_file() and RunDir.open(folder).checkpoints.exist()
    return begun and RunDir.open(folder).checkpoints.load()[0]["finished"]


def train_one(wanted: PlannedTraining, clips: ClipSet, folder: Path, clips_folder: Path) -> None:
    """One training, with a checkpoint at its end alone."""
    options = options_of(wanted.row)
    record = {
        "preset": "paper" if wanted.row == "paper" else "modern-2026a",
        "seed": wanted.seed,
        "clips": str(clips_folder.absolute()),
        "frames": clips.frames,
        "size": clips.size,
        "train": options_to_json(options),
    }
    run = RunDir.open(folder) if folder.exists() else RunDir.new(folder, record).begin()
    kind = LongEpochTraining if wanted.regime == "long" else Training
    with training_numerics(options, torch.device("cpu")):
        training = new_training(clips, options, run, seed=wanted.seed, training_class=kind)
        training.resume()
        training.loop(checkpoint_every=options.epochs + 1)


def measure_all(clips_folder: Path, runs: Path, out: Path) -> None:
    """Measure the finished trainings and write ablation.json."""
    clips = ClipSet.open(clips_folder, "train")
    rows = []
    for wanted in plan():
        if finished(runs / wanted.folder):
            mode = options_of(wanted.row).batchnorm
            rows.append({**wanted._asdict(), "batchnorm": mode, **quality(runs / wanted.folder, mode, clips)})
            print(json.dumps(rows[-1]), flush=True)
    settings = {
        "train": len(clips),
        "batch_size": min(len(clips), options_of("modern-2026a").batch_size),
        "idle_steps": idle_steps(len(clips)),
    }
    record = {"format": "vglann-ablation", "version": 1, "clips": settings, "runs": rows}
    write_json(out / "ablation.json", record)


def quality(folder: Path, mode: str, clips: ClipSet) -> dict[str, Any]:
    """Return what `measure` finds in a run; kept in the run's folder, since it takes a minute."""
    file = folder / f"quality-{mode}.json"
    if not file.is_file():
        write_json(file, measure(load_trained(RunDir.open(folder)), mode, clips))
    return read_json(file)


def measure(trained: Trained, mode: str, clips: ClipSet) -> dict[str, Any]:
    """Steps taken, and the mean of each measure over all clips, BatchNorm in mode "train" or "eval".

    The batches are drawn at random, as in training: neighbors in the folder are clips of one shot, and a batch
    of those has other statistics than any the generator was trained with.
    """
    order = np.random.default_rng(0).permutation(len(clips))
    batches = np.array_split(order, -(-len(clips) // trained.options.batch_size))
    if mode == "eval":
        recompute_batchnorm(trained.generator, (trained.latents[torch.from_numpy(rows)] for rows in batches))
    trained.generator.train(mode == "train")
    return {"steps": trained.step, **means_of(list(measures_of(trained, clips, batches)))}


def measures_of(trained: Trained, clips: ClipSet, batches: list[np.ndarray]) -> Iterator[dict[str, Tensor]]:
    """`reconstruction_metrics` of each batch of clips."""
    for rows in batches:
        made = render(trained, trained.latents[torch.from_numpy(rows)]).video
        yield reconstruction_metrics(torch.from_numpy(made), torch.from_numpy(clips.read(rows)))


def time_all(clips_folder: Path, out: Path) -> None:
    """Time the rows' steps in turns on one thread; write ablation_time.json.

    {"format": "vglann-ablation-time", "version": 1, "ms": {row: median}, "of_paper": {row: ratio}}, in CPU time of
    the process: what else the machine does hardly counts, and not for some rows more than for others.
    """
    torch.set_num_threads(1)
    clips = ClipSet.open(clips_folder, "train")
    trainings = {row: new_training(clips, options_of(row), RunDir(out, {})) for row in CHANGES}
    times: dict[str, list[float]] = {row: [] for row in trainings}
    for _ in range(WARM_UP + TIMED):
        for row, training in trainings.items():
            started = time.process_time()
            training.train_step(with_video=False)
            times[row].append(time.process_time() - started)
    ms = {row: 1e3 * median(values[WARM_UP:]) for row, values in times.items()}
    ratios = {row: value / ms["paper"] for row, value in ms.items()}
    record = {"format": "vglann-ablation-time", "version": 1, "ms": ms, "of_paper": ratios}
    write_json(out / "ablation_time.json", record)


def main() -> None:
    """The three verbs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, folders in {"train": ("runs",), "measure": ("runs", "out"), "time": ("out",)}.items():
        p = verbs.add_parser(verb)
        for name in ("clips", *folders):
            p.add_argument(name, type=Path)
        if verb == "train":
            p.add_argument("--only", nargs="+", default=[], help="names of run folders")
    a = parser.parse_args()
    if a.verb == "train":
        train_all(a.clips, a.runs, a.only)
    elif a.verb == "measure":
        measure_all(a.clips, a.runs, a.out)
    else:
        time_all(a.clips, a.out)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # progress
    main()
