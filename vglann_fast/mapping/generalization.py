"""Measure overfitting: how near a mapping comes to the latents it was fitted to, and to latents held out.

The record, kept in mapping.json under "gap":

    {"samples": how many were drawn, "fitted": part, "held_out": part or null}
    part: {"latents": how many were looked at, "distance", "nll"}

"distance" is the mean Euclidean distance from a latent to the nearest of the samples, all unit rows: every kind of
mapping has it. "nll" is the mean negative log density of the latents' directions in nats, 0 for the uniform
distribution, lower is better; null for a kind without a density.

By the held-out latents gmm has chosen its number of components, and the flows their epoch: theirs are figures of a
set that was also used to choose, so a little better than on latents that had no part in anything.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vglann_kernels import nearest_rows

from vglann_fast.errors import VglannError
from vglann_fast.mapping.base import LatentSampler

SAMPLES = 4096
MAX_LATENTS = 4096  # of either part


def measure_gap(
    mapping: LatentSampler, fitted: Tensor, held_out: Tensor | None, generator: torch.Generator
) -> dict[str, Any]:
    """Return the record for latents [N, d] that were fitted and [n, d] held out, with samples from `generator`.

    Raises `VglannError` when the samples are not finite.
    """
    samples = F.normalize(mapping.sample(SAMPLES, generator), dim=1)
    if not torch.isfinite(samples).all():
        raise VglannError(f"{mapping.kind}: the fitted mapping makes latents that are not finite; lower --lr")

    def part(latents: Tensor) -> dict[str, Any]:
        rows = F.normalize(latents[:MAX_LATENTS], dim=1)
        density = mapping.log_density(rows)
        return {
            "latents": len(rows),
            "distance": nearest_rows(rows, samples)[1].sqrt().mean().item(),
            "nll": None if density is None else -density.mean().item(),
        }

    return {
        "samples": SAMPLES,
        "fitted": part(fitted),
        "held_out": None if held_out is None else part(held_out),
    }


def describe_gap(record: dict[str, Any]) -> str:
    """The record as one line."""
    fitted, held_out = record["fitted"], record["held_out"]
    lines = []
    for key, name in (
        ("distance", f"distance to the nearest of {record['samples']} samples"),
        ("nll", "NLL"),
    ):
        if fitted[key] is None:
            continue
        line = f"{name}: {fitted[key]:.4g} from latents it was fitted to"
        if held_out is not None:
            gap = held_out[key] - fitted[key]
            line += f", {held_out[key]:.4g} from {held_out['latents']} held out (gap {gap:+.3g})"
        lines.append(line)
    return "; ".join(lines)
