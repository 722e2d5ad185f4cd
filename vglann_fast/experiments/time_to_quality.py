"""CPU time to a quality of reconstruction: `modern`, `modern-2026a`, `paper` and the GLANN-VIDEO code.

    vglann clips fetch L                                # the film; prints the folder
    vglann clips pack FOLDER/bbb.mp4 --out CLIPS        # split by shot
    python -m vglann_fast.experiments.time_to_quality train CLIPS RUNS    # stop and start at will
    python -m vglann_fast.experiments.time_to_quality report CLIPS RUNS OUT FIGURE

`train` takes every training of `PLAN` to its end and measures it on the way, at the costs of `COSTS`: all training
clips as 8-bit values, all frames, BatchNorm in the run's own mode with statistics of that moment. `report` times a
step of each kind, in turns in one process of one thread, by CPU time. So other programs hardly change the seconds,
and measuring adds none. The GLANN-VIDEO step computes what preset `paper` does, which a benchmark checks, so it has
the curve of `paper` and seconds of its own.

OUT/time_to_quality.json: {"format": "vglann-time-to-quality", "version": 2, "targets": {"psnr": [dB],
"motion_r2": [...]}, "baselines": {"psnr_still", "psnr_pca", "motion_r2_pca"}, "rows": [{"row", "epochs", "seed",
"ms": {"background", "full"}, "points": [{"step", "background_steps", "full_steps", "seconds", "psnr",
"psnr_last_frame", "ssim", "motion_r2"}]}]}
"""

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.experiments.step_rows import author_and_ours
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.batchnorm import latent_batches, recompute_batchnorm
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.glo.precision import training_numerics
from vglann_fast.glo.training import Training
from vglann_fast.metrics.reconstruction import reconstruction_quality, training_pca
from vglann_fast.options.fields import options_to_json
from vglann_fast.options.presets import PRESETS
from vglann_fast.options.training import BACKGROUND_COST, PresetName, TrainOptions
from vglann_fast.run.files import append_line, json_lines, write_json
from vglann_fast.run.folder import RunDir

AUTHOR = "GLANN-VIDEO code"
WIDTH = 32
# In full steps: where a training is measured.
COSTS = (5, 10, 20, 30, 40, 56, 70, 98, 140, 200, 280, 400, 560, 780, 1000)
TARGETS = {"psnr": (17.0, 19.0, 21.0, 23.0), "motion_r2": (0.1, 0.2, 0.3)}
WARM_UP, TIMED = 2, 7
KEPT = ("psnr", "psnr_last_frame", "ssim", "motion_r2")
COLORS = {"modern": "#1f6fb4", "modern-2026a": "#d1601c", "paper": "#777777", AUTHOR: "#bbbbbb"}


class PlannedTraining(NamedTuple):
    """A preset, its `--epochs`, and a seed."""

    preset: PresetName
    epochs: int
    seed: int

    @property
    def options(self) -> TrainOptions:
        """The preset's options at the size of this study."""
        return replace(PRESETS[self.preset].train, width=WIDTH, epochs=self.epochs)

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return f"{self.preset}.{self.epochs}.{self.seed}"


PLAN = (
    PlannedTraining("modern-2026a", 20, 1),
    PlannedTraining("modern", 20, 2),
    PlannedTraining("modern", 71, 1),
    PlannedTraining("modern", 20, 3),
    PlannedTraining("paper", 20, 1),
)


def train_all(folder: Path, runs: Path, only: list[str]) -> None:
    """Take the trainings of `PLAN` to their ends; one that was stopped continues."""
    clips = ClipSet.open(folder, "train")
    for wanted in PLAN:
        if not only or wanted.name in only:
            train_one(wanted, clips, runs / wanted.name)


def train_one(wanted: PlannedTraining, clips: ClipSet, folder: Path) -> None:
    """One training, measured at `COSTS` and at its end; the points are the lines of quality.jsonl in its folder."""
    record = {
        "preset": wanted.preset,
        "seed": wanted.seed,
        "clips": str(clips.folder.absolute()),
        "frames": clips.frames,
        "size": clips.size,
        "train": options_to_json(wanted.options),
    }
    run = RunDir.open(folder) if folder.exists() else RunDir.new(folder, record).begin()
    with training_numerics(wanted.options, torch.device("cpu")):
        training = new_training(clips, wanted.options, run, seed=wanted.seed)
        training.resume()
        background = background_steps(training)
        measured = {point["step"] for point in points_of(folder)}
        for stop in measured_steps(background, training.last_step):
            training.loop(checkpoint_every=10**6, max_steps=stop)
            if stop not in measured and training.step == stop:
                append_line(folder / "quality.jsonl", point_of(run, clips, background))


def background_steps(training: Training) -> int:
    """Return the number of training steps of the background alone."""
    return training.options.background_passes * training.steps_per_epoch


def measured_steps(background: int, last: int) -> list[int]:
    """The steps after which a training has cost as much as `COSTS` say, and its last one."""
    cheap = round(background * BACKGROUND_COST)
    steps = [round(cost / BACKGROUND_COST) if cost <= cheap else background + cost - cheap for cost in COSTS]
    return [*(step for step in steps if step < last), last]


def point_of(run: RunDir, clips: ClipSet, background: int) -> dict[str, Any]:
    """The quality of the newest checkpoint, and the steps it took."""
    trained = load_trained(run, "cpu")
    if trained.options.batchnorm == "eval":
        recompute_batchnorm(trained.generator, latent_batches(trained.latents, trained.options.batch_size))
    quality = reconstruction_quality(trained, clips)
    done = min(trained.step, background)
    steps = {"step": trained.step, "background_steps": done, "full_steps": trained.step - done}
    point = steps | {name: quality[name] for name in KEPT}
    print(json.dumps({"run": run.path.name, **point}), flush=True)
    return point


def points_of(folder: Path) -> list[dict[str, Any]]:
    """Return what was measured of a training so far, the first step first."""
    file = folder / "quality.jsonl"
    found = {point["step"]: point for point in json_lines(file)} if file.is_file() else {}
    return [found[step] for step in sorted(found)]


def milliseconds(clips: ClipSet) -> dict[str, dict[str, float]]:
    """Medians of {row: {"background": ms, "full": ms}}, timed in turns by the CPU time of one thread."""
    torch.set_num_threads(1)
    author, paper, training = author_and_ours(
        clips, TrainOptions().batch_size, WIDTH, torch.device("cpu"), {"precision": "fp32"}
    )
    changes: dict[tuple[PresetName, str], dict[str, Any]] = {
        ("modern-2026a", "full"): {},
        ("modern", "full"): {"background_share": 0.0},
        ("modern", "background"): {},
    }
    ours = {
        kind: new_training(clips, replace(PRESETS[kind[0]].train, width=WIDTH, **changed), training.run)
        for kind, changed in changes.items()
    }
    steps: dict[tuple[str, str], Callable[[int], object]] = {
        (AUTHOR, "full"): author,
        ("paper", "full"): paper,
    }
    steps |= {kind: partial(_step, one) for kind, one in ours.items()}
    times: dict[tuple[str, str], list[float]] = {kind: [] for kind in steps}
    for number in range(WARM_UP + TIMED):
        for kind, step in steps.items():
            started = time.process_time()
            step(number)
            times[kind].append(time.process_time() - started)
    found: dict[str, dict[str, float]] = {}
    for (row, part), values in times.items():
        found.setdefault(row, {"background": 0.0})[part] = 1e3 * median(values[WARM_UP:])
    return found


def _step(training: Training, number: int) -> None:
    assert training.step == number
    training.train_step(with_video=False)


def report(folder: Path, runs: Path, out: Path, figure: Path) -> None:
    """Time, write the record, draw the figure and print the table."""
    clips = ClipSet.open(folder, "train")
    ms = milliseconds(clips)
    trained = [(one, points_of(runs / one.name)) for one in PLAN if (runs / one.name).is_dir()]
    rows = [row_of(one.preset, one, ms[one.preset], points) for one, points in trained]
    rows += [row_of(AUTHOR, one, ms[AUTHOR], points) for one, points in trained if one.preset == "paper"]
    newest = load_trained(RunDir.open(runs / trained[0][0].name), "cpu")
    quality = reconstruction_quality(newest, clips, training_pca(newest, clips))
    record = {
        "format": "vglann-time-to-quality",
        "version": 2,
        "targets": {name: list(values) for name, values in TARGETS.items()},
        "baselines": {name: quality[name] for name in ("psnr_still", "psnr_pca", "motion_r2_pca")},
        "rows": rows,
    }
    write_json(out / "time_to_quality.json", record)
    draw(record, figure)
    print(table(record))


def row_of(
    row: str, one: PlannedTraining, ms: dict[str, float], points: list[dict[str, Any]]
) -> dict[str, Any]:
    """The row of the record for one training, with the seconds of its points."""
    timed = [
        point
        | {"seconds": (point["background_steps"] * ms["background"] + point["full_steps"] * ms["full"]) / 1e3}
        for point in points
    ]
    return {"row": row, "epochs": one.epochs, "seed": one.seed, "ms": ms, "points": timed}


def seconds_to(points: list[dict[str, Any]], measure: str, target: float) -> float | None:
    """Seconds at the first point that has `target`; None if no point has."""
    return next((point["seconds"] for point in points if point[measure] >= target), None)


def table(record: dict[str, Any]) -> str:
    """Markdown: a line for each training, seconds to each target, and where it ended."""
    targets = [(measure, target) for measure, values in record["targets"].items() for target in values]
    heads = [f"{target:g} dB" if measure == "psnr" else f"R² {target:g}" for measure, target in targets]
    lines = [
        f"| training | seed | step, ms | {' | '.join(heads)} | all, s | dB at the end | R² |",
        "|---" * (len(heads) + 6) + "|",
    ]
    for row in record["rows"]:
        found = [seconds_to(row["points"], *target) for target in targets]
        cells = ["–" if value is None else f"{value:,.0f}" for value in found]
        end, ms = row["points"][-1], row["ms"]
        step = f"{ms['background']:.0f}, {ms['full']:.0f}" if ms["background"] else f"{ms['full']:.0f}"
        lines.append(
            f"| {row['row']}, {row['epochs']} epochs | {row['seed']} | {step} | {' | '.join(cells)} "
            f"| {end['seconds']:,.0f} | {end['psnr']:.2f} | {end['motion_r2']:.2f} |"
        )
    return "\n".join(lines)


def draw(record: dict[str, Any], file: Path) -> None:
    """PSNR and motion R² over seconds, a line for each training; PCA and the still as level lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = record["baselines"]
    levels = {
        "psnr": {"a still": known["psnr_still"], "PCA, 100 components": known["psnr_pca"]},
        "motion_r2": {"a still": 0.0, "PCA, 100 components": known["motion_r2_pca"]},
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (measure, title) in zip(
        axes, {"psnr": "PSNR, dB", "motion_r2": "motion R²"}.items(), strict=True
    ):
        named: set[str] = set()
        for row in record["rows"]:
            seconds, values = zip(
                *((point["seconds"], point[measure]) for point in row["points"]), strict=True
            )
            label = None if row["row"] in named else row["row"]
            named.add(row["row"])
            axis.plot(seconds, values, "-o", markersize=3, color=COLORS[row["row"]], label=label)
        for (name, value), style in zip(levels[measure].items(), (":", "--"), strict=True):
            axis.axhline(value, linestyle=style, linewidth=1, color="#333333")
            axis.annotate(name, (axis.get_xlim()[1], value), ha="right", va="bottom", fontsize=8)
        axis.set_xscale("log")
        axis.set_xlabel("CPU seconds, one thread")
        axis.set_title(title, fontsize=10)
        axis.grid(color="#eeeeee")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, facecolor="white")
    pyplot.close(figure)


def main() -> None:
    """The two verbs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, names in {"train": ("clips", "runs"), "report": ("clips", "runs", "out", "figure")}.items():
        p = verbs.add_parser(verb)
        for name in names:
            p.add_argument(name, type=Path)
        if verb == "train":
            p.add_argument("--only", nargs="+", default=[], help="names of run folders")
    a = parser.parse_args()
    if a.verb == "train":
        train_all(a.clips, a.runs, a.only)
    else:
        report(a.clips, a.runs, a.out, a.figure)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # progress
    main()
