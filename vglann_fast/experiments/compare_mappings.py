"""Every kind of mapping on the latents of one run, against latents of other shots, as a Markdown table.

    python -m vglann_fast.experiments.compare_mappings RUN [--only imle,gmm] [--seeds 0,1,2] [--holdout-fraction 0.3]

Whole shots are held out to judge by, the same ones for every seed; no kind sees them. All kinds get the other
latents. gmm and the flows set whole shots of these aside, as `vglann map` does, and choose their number of components
or epochs by them. Latents and samples are unit rows times √d, so that x·y / d in the kernel is a cosine. Columns,
each the mean over the seeds:

MMD              kernel distance from the held-out latents to as many samples, without pairs of held-out latents of
                 one shot, and its standard error. All rows share the held-out latents, so the error of a difference
                 between two rows is smaller, and the spread over the seeds is nearer to it
coverage, ...    of one half of the held-out latents against as many samples, over 20 splits by whole shots; the row
                 `truth` is one half against the other, mean ± standard deviation, see `metrics/truth.py`
distance         mean Euclidean distance from a latent, fitted or held out, to the nearest of 4,096 samples
spread of MMD    standard deviation of the MMD over the seeds
seconds          of the fit alone; on a CPU, seconds that this process had of it
samples          on each side of the MMD

In the row `latents` the samples are the fitted latents themselves, drawn with replacement: a sampler that copies.

`default_kind` is the rule by which preset `modern` gets its default kind. It was written before any run of set L was
looked at: among kinds whose coverage is within 0.1 of the truth's, the lowest MMD. imle stays if it is one of these
kinds and its MMD lies within the spread of the lowest.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.mapping.fit import KINDS
from vglann_fast.mapping.generalization import measure_gap
from vglann_fast.mapping.split import run_shots, set_aside
from vglann_fast.metrics.feature_tables import shown
from vglann_fast.metrics.kernel_distance import kernel_distance
from vglann_fast.metrics.truth import Truth
from vglann_fast.options.mapping import ImleOptions, MapOptions
from vglann_fast.options.presets import PRESETS
from vglann_fast.run.folder import RunDir

QUANTILES = (0.02, 0.1, 0.3)  # of RS-IMLE
# Of the rule: the kind that ties keep, and how near the truth's coverage a kind has to be.
KEPT, NEAR = "imle", 0.1
COLUMNS = ("mapping", "MMD", "spread of MMD", "coverage", "density", "precision", "recall", "distance, fitted",
           "distance, held out", "seconds", "samples")  # fmt: skip
SHARES = ("coverage", "density", "precision", "recall")


@dataclass(frozen=True)
class Targets:
    """The latents [N, d] that mappings are fitted to and the held-out latents [n, d] that judge them.

    fitted_shots: int64 [N], numbered from 0 without a gap. shots: int64 [n], of the held-out latents.
    """

    fitted: Tensor
    fitted_shots: Tensor
    held_out: Tensor
    shots: Tensor
    truth: Truth


class Latents:
    """The fitted latents themselves as a sampler."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.latents), (n,), generator=generator, device=self.latents.device)
        return self.latents[rows]

    def log_density(self, latents: Tensor) -> None:
        return None


def contestants(only: Sequence[str]) -> Iterator[tuple[str, str, MapOptions]]:
    """Name of the row, kind and options. The row named by its kind alone has the options of preset modern."""
    for kind in only:
        paper, modern = (PRESETS[preset].map[kind] for preset in ("paper", "modern"))
        yield kind, kind, modern
        if replace(paper, holdout_fraction=modern.holdout_fraction) != modern:
            yield f"{kind}, paper", kind, paper
        if isinstance(modern, ImleOptions):
            for quantile in QUANTILES:
                yield f"imle, reject {quantile:g}", kind, replace(modern, reject_quantile=quantile)


def targets(run: RunDir, holdout_fraction: float, device: str) -> Targets:
    """Split the latents of a run. Raises `VglannError` for too few of them to be split again into halves."""
    trained = load_trained(run, device)
    shots = run_shots(run, trained.ids)
    rows = torch.arange(len(trained.latents))[:, None]
    fitted, held_out = set_aside(rows, shots, holdout_fraction, seed=0)
    if held_out is None:
        raise VglannError("--holdout-fraction 0: nothing is held out to compare with; use 0.3")
    latents, place = trained.latents, held_out[:, 0]
    truth = Truth(scaled(latents[place]), shots[place])
    if not truth.enough:
        raise VglannError(
            f"{len(place)} held-out latents cannot be split by shots into halves of more than 5; raise "
            "--holdout-fraction or train on more shots"
        )
    fitted_shots = shots[fitted[:, 0]].unique(return_inverse=True)[1]
    return Targets(latents[fitted[:, 0]], fitted_shots, latents[place], shots[place], truth)


def scaled(latents: Tensor) -> Tensor:
    """Unit rows times √d, on the CPU."""
    return F.normalize(latents.cpu().double(), dim=1) * latents.shape[1] ** 0.5


def measured(mapping: Any, at: Targets, seed: int, seconds: float) -> dict[str, float]:
    """The figures of one fitted mapping."""
    generator = torch.Generator(at.fitted.device).manual_seed(seed + 1)
    samples = scaled(mapping.sample(len(at.held_out), generator))
    distance, splits = kernel_distance(scaled(at.held_out), samples, at.shots), at.truth.figures_of(samples)
    gap = measure_gap(mapping, at.fitted, at.held_out, generator)
    return {
        "mmd": distance["mmd"],
        "mmd_error": distance["mmd_error"] or float("nan"),
        **{name: splits[name]["mean"] for name in SHARES},
        "fitted": gap["fitted"]["distance"],
        "held_out": gap["held_out"]["distance"],
        "seconds": seconds,
    }


def fit_and_measure(kind: str, options: MapOptions, at: Targets, seed: int, device: str) -> dict[str, float]:
    """Fit a mapping with one seed and measure it."""
    latents, choosing = set_aside(at.fitted, at.fitted_shots, options.holdout_fraction, seed)
    mapping = KINDS[kind](at.fitted.shape[1], options, device, seed=seed)
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    mapping.fit(latents, torch.Generator(device).manual_seed(seed), held_out=choosing)
    # The last row of the log was read from the device, so the fit has ended.
    return measured(mapping, at, seed, clock() - started)


def over_seeds(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure over the seeds, and "mmd_spread", nan for one seed."""
    means = {name: float(np.mean([one[name] for one in figures])) for name in figures[0]}
    spread = float(np.std([one["mmd"] for one in figures], ddof=1)) if len(figures) > 1 else float("nan")
    return {**means, "mmd_spread": spread}


def row(name: str, figures: Mapping[str, float], n: int) -> list[str]:
    """The cells of a mapping."""
    keys = ("mmd_spread", *SHARES, "fitted", "held_out", "seconds")
    return [name, f"{_cell(figures['mmd'])} ± {_cell(figures['mmd_error'])}", *(_cell(figures[key]) for key in keys),
            str(n)]  # fmt: skip


def truth_row(truth: Mapping[str, Any]) -> list[str]:
    """The cells of real against real, at half the samples of the other rows."""
    spreads = [f"{_cell(truth[name]['mean'])} ± {_cell(truth[name]['sd'])}" for name in ("mmd", *SHARES)]
    return ["truth", spreads[0], "", *spreads[1:], "", "", "", str(truth["n"])]


def default_kind(truth: Mapping[str, Any], kinds: Mapping[str, Mapping[str, float]]) -> str | None:
    """Return the default kind of preset modern by the rule above, or None if no kind has the truth's coverage.

    truth: the record of the truth. kinds: figures by kind, with the options of preset modern.
    """
    near = {k: one for k, one in kinds.items() if abs(one["coverage"] - truth["coverage"]["mean"]) <= NEAR}
    if not near:
        return None
    lowest = min(near, key=lambda kind: near[kind]["mmd"])
    spread = max(truth["mmd"]["sd"], np.nan_to_num(near[lowest]["mmd_spread"]))
    kept = KEPT in near and near[KEPT]["mmd"] - near[lowest]["mmd"] <= spread
    return KEPT if kept else lowest


def _cell(value: float) -> str:
    return shown(None if np.isnan(value) else value)


def _line(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print the table and what the rule says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument(
        "--only", default=",".join(KINDS), help="kinds, with commas between them; default all"
    )
    parser.add_argument("--seeds", default="0,1,2", help="default 0,1,2")
    parser.add_argument("--holdout-fraction", type=float, default=0.3, help="default 0.3")
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    only, seeds = a.only.split(","), [int(seed) for seed in a.seeds.split(",")]
    if not set(only) <= KINDS.keys():
        parser.error(f"--only: expected some of {', '.join(KINDS)}")
    try:
        at = targets(RunDir.open(a.run), a.holdout_fraction, a.device)
    except VglannError as error:
        parser.error(str(error))
    n, truth = len(at.held_out), at.truth.figures()
    print(f"{len(at.fitted)} latents of {at.fitted.shape[1]} numbers to fit, {n} held out; seeds {a.seeds}\n")
    _line(COLUMNS)
    print("|---|" + "---:|" * (len(COLUMNS) - 1))
    _line(truth_row(truth))
    _line(row("latents", over_seeds([measured(Latents(at.fitted), at, seed, 0.0) for seed in seeds]), n))
    modern = {}
    for name, kind, options in contestants(only):
        try:
            figures = over_seeds([fit_and_measure(kind, options, at, seed, a.device) for seed in seeds])
        except VglannError as error:
            print(f"\n{name}: not fitted ({error})\n", flush=True)
            continue
        _line(row(name, figures, n))
        if name == kind:
            modern[kind] = figures
    print(f"\nDefault kind by the rule: {default_kind(truth, modern) or 'none, keep ' + KEPT}")


if __name__ == "__main__":
    main()
