"""Coverage, density, precision and recall by exact nearest neighbors (Naeem et al. 2020, Kynkäänniemi et al. 2019).

All take float features [n, d] of real and made videos (or latents) and compute Euclidean distances in float64,
each from the differences of its two rows, so a row's distance to its copy is exactly zero and no result depends on
the size of the chunks.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.metrics.frechet import check_features

_CHUNK = 512  # rows compared at a time


def precision_recall(real: Tensor | np.ndarray, made: Tensor | np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), shares from 0 to 1.

    A set's manifold is the union of balls about its rows, each out to the row's k-th nearest neighbor in the set.
    precision: share of made rows in the real manifold; recall: share of real rows in the made one. 1 and 1 for
    equal sets. Raises `VglannError` for features that are not [n, d] and finite, another d, or n <= k.
    """
    real, made = _checked(real, made, k)
    return _share_inside(made, real, k), _share_inside(real, made, k)


def density_coverage(real: Tensor | np.ndarray, made: Tensor | np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020).

    density: in how many real rows' balls (as above, without their surface) a made row lies, over k; 1 is expected
    for equal distributions, and it may exceed 1. coverage: share, 0 to 1, of real rows whose ball has a made row
    in it. Raises as `precision_recall`.
    """
    real, made = _checked(real, made, k)
    radii = _radii(real, k)
    inside, reached = 0, torch.zeros(len(real), dtype=torch.bool)
    for chunk in _distances(made, real):
        within = chunk < radii
        inside += int(within.sum())
        reached |= within.any(0)
    return inside / (k * len(made)), reached.double().mean().item()


def nearest_distances(rows: Tensor | np.ndarray, others: Tensor | np.ndarray) -> Tensor:
    """From each of `rows` [n, d] to the nearest of `others` [m, d]: float64 [n]. Raises as `precision_recall`."""
    rows, others = _checked(rows, others, 0)
    return torch.cat([chunk.amin(1) for chunk in _distances(rows, others)])


def _share_inside(rows: Tensor, manifold: Tensor, k: int) -> float:
    radii = _radii(manifold, k)
    inside = sum(int((chunk <= radii).any(1).sum()) for chunk in _distances(rows, manifold))
    return inside / len(rows)


def _radii(rows: Tensor, k: int) -> Tensor:
    """Distance of each row [n, d] to its k-th nearest other row: [n]."""
    # A row is among its own neighbors, at distance 0, so the k-th other one is the (k + 1)-th.
    return torch.cat([chunk.kthvalue(k + 1, dim=1).values for chunk in _distances(rows, rows)])


def _distances(rows: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Distances of chunks of `rows` to all `others`, [c, m] each."""
    for chunk in rows.split(_CHUNK):
        yield torch.cdist(chunk, others, compute_mode="donot_use_mm_for_euclid_dist")


def _checked(real: Tensor | np.ndarray, made: Tensor | np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    real, made = check_features(real), check_features(made)
    if real.shape[1] != made.shape[1]:
        raise VglannError(f"real features have {real.shape[1]} numbers, generated ones {made.shape[1]}")
    if min(len(real), len(made)) <= k:
        raise VglannError(f"{k} neighbors need more than {k} videos, got {len(real)} and {len(made)}")
    return real, made
