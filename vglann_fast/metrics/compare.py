"""Sets of videos, boiled down to a few numbers each, and every figure of how like two of them are."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.metrics.features import Extractor, extract
from vglann_fast.metrics.frechet import FeatureMoments, frechet_distance, frechet_warnings
from vglann_fast.metrics.kernel_distance import kernel_distance
from vglann_fast.metrics.prdc import density_coverage, precision_recall
from vglann_fast.metrics.temporal import frame_steps
from vglann_fast.progress import Progress
from vglann_fast.samples.nearest import nearest_clips

MANIFOLD_K, BALL_K = 3, 5  # neighbors: of precision and recall, of density and coverage
QUARTERS = 4
_FEWEST = 8  # videos in a quarter


@dataclass(frozen=True)
class Measurement:
    """What is kept of a set of n videos: a few numbers each."""

    features: dict[str, Tensor]  # name -> float64 [n, d]
    steps: Tensor  # float64 [n, T-1], see `frame_steps`
    distances: (
        Tensor  # float64 [n]: root mean square difference to the nearest training clip, in 1/255; or [0]
    )
    digests: list[bytes]  # sha256 of each video

    @property
    def sha256(self) -> str:
        """Of the videos, whatever their order."""
        return hashlib.sha256(b"".join(sorted(self.digests))).hexdigest()


def measure(
    name: str,
    videos: Iterable[np.ndarray],
    n: int,
    extractors: Mapping[str, Extractor],
    training: ClipSet | None = None,
    device: torch.device | str = "cpu",
) -> Measurement:
    """Measure n uint8 videos, handed over in blocks (b, 3, T, H, W) of any size.

    name: of the set, for the line of progress. Distances in pixels are taken where there are `training` clips to
    take them to.
    """
    features: dict[str, list[Tensor]] = {key: [] for key in extractors}
    steps, distances, digests = [], [torch.zeros(0, dtype=torch.float64)], []
    with Progress(name, n, "video") as progress:
        for block in videos:
            for key, rows in extract(extractors, block).items():
                features[key].append(rows)
            steps.append(frame_steps(torch.from_numpy(block)))
            if training is not None:
                distances.append(nearest_clips(block, training, device)[1].sqrt())
            digests += [hashlib.sha256(video.tobytes()).digest() for video in block]
            for _ in block:
                progress.advance()
            progress.show(motion=steps[-1].mean().item())
    together = {key: torch.cat(parts) for key, parts in features.items()}
    return Measurement(together, torch.cat(steps), torch.cat(distances), digests)


def compare(real: Tensor, made: Tensor, shots: Tensor | None = None) -> dict[str, Any]:
    """Features [n, d] of real videos against generated ones; shots: int64 [n], of the real ones, where known.

    Returns, JSON-able:

        n, dimensions      videos on each side, the fewer if they differ, and d
        mmd, mmd_error     the kernel distance and its standard error, see `kernel_distance`
        frechet            the Fréchet distance; not to be ranked by where n < 2 d
        quarters           {"n", "values", "mean", "sd"}: the Fréchet distance over disjoint quarters of both; each
                           is of fewer videos, so the mean lies above `frechet`; null with fewer than 32 videos
        precision, recall  k = 3; density, coverage: k = 5; null with 5 videos or fewer
        warnings           what makes these figures doubtful, a line each

    Raises `VglannError` as `frechet_distance` and `check_features`.
    """
    n = min(len(real), len(made))
    sides = FeatureMoments.of(real), FeatureMoments.of(made)
    distance = frechet_distance(*sides)
    figures: dict[str, Any] = {
        "n": n,
        "dimensions": real.shape[1],
        **kernel_distance(real, made, shots),
        "frechet": distance,
        "quarters": _quarters(real, made),
    }
    warnings = frechet_warnings(*sides, distance)
    enough = n > max(MANIFOLD_K, BALL_K)
    if not enough:
        warnings.append(f"{n} videos are too few for precision, recall, density and coverage")
    shares = precision_recall(real, made, MANIFOLD_K) if enough else (None, None)
    balls = density_coverage(real, made, BALL_K) if enough else (None, None)
    names = ("precision", "recall", "density", "coverage")
    return {**figures, **dict(zip(names, (*shares, *balls), strict=True)), "warnings": warnings}


def _quarters(real: Tensor, made: Tensor) -> dict[str, Any] | None:
    size = min(len(real), len(made)) // QUARTERS
    if size < _FEWEST:
        return None
    pairs = [(real[at : at + size], made[at : at + size]) for at in range(0, QUARTERS * size, size)]
    values = [frechet_distance(FeatureMoments.of(a), FeatureMoments.of(b)) for a, b in pairs]
    return {"n": size, "values": values, "mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
