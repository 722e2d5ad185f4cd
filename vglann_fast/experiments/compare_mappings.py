"""Every kind of mapping on the latents of one run, side by side, as a Markdown table.

    python -m vglann_fast.experiments.compare_mappings RUN [--only imle,gmm] [--holdout-fraction 0.1] [--seed 0]

All are fitted to the same latents, and the same shots are set aside; gmm and the flows also choose by these. As many
samples are drawn as there are latents to fit, for

coverage    share of the fitted latents with a sample within the distance of their fifth neighbor among themselves
density     how many such balls a sample lies in, over five; about 1 for samples distributed as the latents

and 4,096 samples for

distance    mean Euclidean distance from a latent to the nearest sample, of those fitted and of those set aside
match_diversity     distinct samples that are nearest to a fitted latent, over fitted latents; higher is better

NLL is of the directions of latents, in nats, 0 for uniform ones. The seconds are those of the fit alone, on a CPU
those that this process had of it. In the row `latents` the samples are the fitted latents themselves, drawn with
replacement: learned by heart.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vglann_kernels import nearest_rows

from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.mapping.fit import KINDS
from vglann_fast.mapping.generalization import SAMPLES, measure_gap
from vglann_fast.mapping.split import run_shots, set_aside
from vglann_fast.metrics.prdc import density_coverage
from vglann_fast.options.mapping import ImleOptions, MapOptions
from vglann_fast.options.presets import PRESETS
from vglann_fast.run.folder import RunDir

QUANTILES = (0.02, 0.1, 0.3)
COLUMNS = ("mapping", "coverage", "density", "match diversity", "distance, fitted", "set aside", "gap", "NLL, fitted",
           "set aside", "seconds")  # fmt: skip


class Latents:
    """The latents themselves as a sampler."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.latents), (n,), generator=generator, device=self.latents.device)
        return self.latents[rows]

    def log_density(self, latents: Tensor) -> None:
        return None


def contestants() -> Iterator[tuple[str, str, MapOptions]]:
    """Name of the row, kind and options."""
    for kind in KINDS:
        paper, modern = (PRESETS[preset].map[kind] for preset in ("paper", "modern"))
        if replace(paper, holdout_fraction=modern.holdout_fraction) != modern:
            yield f"{kind}, paper", kind, paper
            yield f"{kind}, modern", kind, modern
        else:
            yield kind, kind, modern
        if isinstance(modern, ImleOptions):
            for quantile in QUANTILES:
                yield f"imle, modern, reject {quantile:g}", kind, replace(modern, reject_quantile=quantile)


def measured(
    name: str, mapping: Any, fitted: Tensor, held_out: Tensor, seed: int, seconds: float
) -> list[str]:
    """The cells of a row."""
    generator = torch.Generator(fitted.device).manual_seed(seed + 1)
    rows = F.normalize(fitted, dim=1)
    samples = F.normalize(mapping.sample(len(rows), generator), dim=1)
    density, coverage = density_coverage(rows, samples)
    many = F.normalize(mapping.sample(SAMPLES, generator), dim=1)
    diversity = nearest_rows(rows, many)[0].unique().numel() / len(rows)
    gap = measure_gap(mapping, fitted, held_out, generator)
    seen, unseen = gap["fitted"], gap["held_out"]
    nll = ["", ""] if seen["nll"] is None else [f"{seen['nll']:.1f}", f"{unseen['nll']:.1f}"]
    distances = [seen["distance"], unseen["distance"], unseen["distance"] - seen["distance"]]
    return [name, f"{coverage:.3f}", f"{density:.2f}", f"{diversity:.3f}", *(f"{x:.3f}" for x in distances), *nll,
            f"{seconds:.1f}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--only", help="kinds, with commas between them; default all")
    parser.add_argument("--holdout-fraction", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    run = RunDir.open(a.run)
    trained = load_trained(run, a.device)
    fitted, held_out = set_aside(trained.latents, run_shots(run, trained.ids), a.holdout_fraction, a.seed)
    if held_out is None:
        parser.error("--holdout-fraction: expected above 0")
    print(
        f"Step {trained.step}: {len(fitted)} latents fitted, {len(held_out)} set aside, {fitted.shape[1]}-d\n"
    )
    print("| " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * (len(COLUMNS) - 1))
    by_heart = measured("latents", Latents(fitted), fitted, held_out, a.seed, 0.0)
    print("| " + " | ".join(by_heart) + " |", flush=True)
    for name, kind, options in contestants():
        if a.only and kind not in a.only.split(","):
            continue
        mapping = KINDS[kind](
            fitted.shape[1], replace(options, holdout_fraction=a.holdout_fraction), a.device, seed=a.seed
        )
        clock = time.process_time if a.device == "cpu" else time.perf_counter
        started = clock()
        mapping.fit(fitted, torch.Generator(a.device).manual_seed(a.seed), held_out=held_out)
        seconds = clock() - started  # the last row of the log was read from the device
        print(
            "| " + " | ".join(measured(name, mapping, fitted, held_out, a.seed, seconds)) + " |", flush=True
        )


if __name__ == "__main__":
    main()
