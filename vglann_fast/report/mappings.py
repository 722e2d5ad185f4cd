"""Compare the mappings of a run on its latents: what of the training latents their samples reach.

Of a run with N latents, at most `MAXIMA` of them, evenly spaced, and as many samples of each mapping, all unit rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vglann_fast.errors import VglannError

if TYPE_CHECKING:
    from torch import Tensor

    from vglann_fast.run.folder import RunDir

MAXIMA = 1024
_NEIGHBORS = 5  # of coverage and density


@dataclass(frozen=True)
class MappingComparison:
    """One mapping against the training latents.

    coverage, density: Naeem et al. 2020 with k = 5, on latents; samples distributed like the latents have 0.97 and 1.
        None with 5 latents or fewer.
    match_diversity: distinct samples that are nearest to a latent, over latents; lower when few samples serve many.
    points: float64 [n, 2], the samples along the first two principal axes of the latents.
    """

    coverage: float | None
    density: float | None
    match_diversity: float
    points: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """latents: float64 [n, 2] along their principal axes; shares: how much of their variance these carry."""

    latents: np.ndarray
    shares: tuple[float, float]
    mappings: dict[str, MappingComparison]


def compare_mappings(run: Path, kinds: Iterable[str], problems: list[str]) -> Comparison | None:
    """Compare the fitted mappings of a run; None without any, or without a checkpoint.

    What cannot be read becomes a line in `problems`.
    """
    fitted = [kind for kind in kinds if (run / "mapping" / kind / "mapping.safetensors").is_file()]
    if not fitted or not (run / "checkpoints").is_dir():
        return None
    from vglann_fast.glo.checkpoint import load_trained
    from vglann_fast.run.folder import RunDir
    from vglann_fast.runtime.numerics import numerics

    try:
        opened = RunDir.open(run)
        with numerics():
            return _compared(opened, load_trained(opened).latents, fitted, problems)
    except VglannError as error:
        problems.append(f"checkpoints: {error}")
        return None


def _compared(run: "RunDir", latents: "Tensor", kinds: list[str], problems: list[str]) -> Comparison:
    import torch
    import torch.nn.functional as F

    from vglann_fast.mapping.fit import load_mapping

    rows = F.normalize(latents[:: -(-len(latents) // MAXIMA)].double(), dim=1)
    mean = rows.mean(0)
    _, values, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    axes = F.pad(axes, (0, 0, 0, max(0, 2 - len(axes))))[:2].T
    spread = F.pad(values.square(), (0, 2)) / values.square().sum().clamp(min=1e-30)
    found = {}
    for kind in kinds:
        try:
            drawn = load_mapping(run, kind).sample(len(rows), torch.Generator().manual_seed(0))
        except VglannError as error:
            problems.append(f"mapping/{kind}: {error}")
            continue
        samples = F.normalize(drawn.double(), dim=1)
        if samples.shape[1] != rows.shape[1] or not torch.isfinite(samples).all():
            problems.append(f"mapping/{kind}: its samples are not latents of this run")
            continue
        found[kind] = _figures(rows, samples, ((samples - mean) @ axes).numpy())
    shares = (spread[0].item(), spread[1].item())
    return Comparison(((rows - mean) @ axes).numpy(), shares, found)


def _figures(rows: "Tensor", samples: "Tensor", points: np.ndarray) -> MappingComparison:
    from vglann_kernels import nearest_rows

    from vglann_fast.metrics.prdc import density_coverage

    enough = len(rows) > _NEIGHBORS
    density, coverage = density_coverage(rows, samples, _NEIGHBORS) if enough else (None, None)
    nearest = nearest_rows(rows.float(), samples.float())[0]
    return MappingComparison(coverage, density, len(nearest.unique()) / len(rows), points)
