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
from vglann_fast.runtime.distributed import Ranks
from vglann_fast.samples.nearest import nearest_clips

MANIFOLD_K, BALL_K = 3, 5  # neighbors: of precision and recall, of density and coverage
QUARTERS = 4
_FEWEST = 8  # videos in a quarter


@dataclass(frozen=True)
class Measurement:
    """Measurements of a set of n videos: a few numbers each."""

    features: dict[str, Tensor]  # name -> float64 [n, d]
    steps: Tensor  # float64 [n, T-1], see `frame_steps`
    distances: (
        Tensor  # float64 [n]: root mean square difference to the nearest training clip, in 1/255; or [0]
    )
    digests: list[bytes]  # sha256 of each video

    @classmethod
    def joined(cls, parts: list["Measurement"]) -> "Measurement":
        """The measurements of parts of a set, of one or more videos each, as one."""
        return cls(
            {key: torch.cat([part.features[key] for part in parts]) for key in parts[0].features},
            torch.cat([part.steps for part in parts]),
            torch.cat([part.distances for part in parts]),
            [digest for part in parts for digest in part.digests],
        )

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
    ranks: Ranks | None = None,
) -> Measurement:
    """Measure uint8 videos, handed over in blocks (b, 3, T, H, W) of any size.

    Args:
        name: of the set, for the line of progress.
        videos: with several `ranks` the blocks of this process's share.
        n: how many videos these are, for the line of progress.
        training: clips to which distances in pixels are taken. Default: no distances.

    Returns the measurement of all processes' blocks, in every process.
    """
    ranks = ranks or Ranks()
    blocks = []
    with Progress(name, n, "video", shown=ranks.rank == 0) as progress:
        for block in videos:
            steps, distances = frame_steps(torch.from_numpy(block)), torch.zeros(0, dtype=torch.float64)
            if training is not None:
                distances = nearest_clips(block, training, device)[1].sqrt()
            digests = [hashlib.sha256(video.tobytes()).digest() for video in block]
            blocks.append(Measurement(extract(extractors, block), steps, distances, digests))
            for _ in block:
                progress.advance()
            progress.show(motion=steps.mean().item())
    return Measurement.joined(ranks.gather_shares(blocks))


def compare(
    real: Tensor, made: Tensor, shots: Tensor | None = None, made_shots: Tensor | None = None
) -> dict[str, Any]:
    """Features [n, d] of real videos against generated ones; shots: int64 [n], of either side, where known.

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
        **kernel_distance(real, made, shots, made_shots),
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
