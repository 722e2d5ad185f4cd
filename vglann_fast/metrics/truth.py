"""The truth row: what real videos reach against other real videos, at the n at which every source is measured.

Density, coverage, precision and recall have no best value that is known beforehand: samples that gather in the middle
of the data have a larger coverage and density than the data itself. So the real videos are split into halves by whole
shots, 20 times, and one half is compared with the other. A source is compared with the same first halves, by as many
of its videos. The record of either, JSON-able:

    {"n": videos on each side, "splits": 20, "mmd": {"mean", "sd"}, and the same for "precision", "recall",
     "density" and "coverage"}

The kernel distance leaves out pairs of one shot, see `kernel_distance.py`, so between halves it is 0 on average; a
half that is of one shot keeps its pairs. A source with a smaller one is not further from the truth.

mean and sd (over n - 1) are over the splits. Splits share videos, so the sd describes the value of one split; it is
not the error of the mean. Of more than 2,048 real videos 2,048 take part, whole shots in random order, of which the
last may be cut; of more than 2,048 of a source a random 2,048 do. Both are drawn with a fixed seed.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vglann_fast.metrics.compare import BALL_K, MANIFOLD_K
from vglann_fast.metrics.frechet import check_features
from vglann_fast.metrics.judgment import SPREAD_FIGURES
from vglann_fast.metrics.kernel_distance import cubic_kernel, independent_groups, pairs_between

SPLITS = 20
_MAX_ROWS = 2048  # of a side, so that its matrices of distances and kernels take 32 MB each


class Truth:
    """Real features, split into halves.

    Args:
        real: features [n, d], finite.
        groups: int64 [n], the shot of each row; a shot is never split. None: every row is a shot of its own.
        most: the most videos of a half, for sources that have fewer.

    n: videos of a half, the same in all splits; `enough` says if they suffice for five neighbors.
    """

    def __init__(
        self, real: Tensor | np.ndarray, groups: Tensor | None = None, most: int = _MAX_ROWS
    ) -> None:
        real = check_features(real)
        groups = torch.arange(len(real)) if groups is None else groups.cpu()
        rows = _chosen(groups)
        self._real, self._groups = real[rows], groups[rows]
        sides = [_halves(self._groups, torch.Generator().manual_seed(split)) for split in range(SPLITS)]
        self.n = min(most, *(len(rows) for pair in sides for rows in pair))
        self.enough = self.n > max(MANIFOLD_K, BALL_K)
        self._splits = [(first[: self.n], second[: self.n]) for first, second in sides]

    def figures(self) -> dict[str, Any]:
        """The record of real against real."""
        distances, kernel = _distances(self._real, self._real), cubic_kernel(self._real, self._real)
        found = []
        for a, b in self._splits:
            found.append(
                _figures(
                    [distances[a][:, a], distances[b][:, b], distances[b][:, a]],
                    [kernel[a][:, a], kernel[b][:, b], kernel[b][:, a]],
                    [independent_groups(self.n, self._groups[rows]) for rows in (a, b)],
                )
            )
        return self._record(found)

    def figures_of(self, generated: Tensor | np.ndarray, groups: Tensor | None = None) -> dict[str, Any]:
        """The record of features [m, d] of a source, m at least `n`.

        groups: int64 [m], the shot of each row, where the source stands for real clips.
        """
        generated = check_features(generated)
        groups = torch.arange(len(generated)) if groups is None else groups.cpu()
        chosen = _chosen(torch.arange(len(generated)))
        generated, groups = generated[chosen], groups[chosen]
        sides = (self._real, self._real), (generated, generated), (generated, self._real)
        real, made, between = (_distances(*pair) for pair in sides)
        real_kernel, made_kernel, between_kernel = (cubic_kernel(*pair) for pair in sides)
        rows = []
        for split, (a, _) in enumerate(self._splits):
            drawn = torch.randperm(len(generated), generator=torch.Generator().manual_seed(split))[: self.n]
            rows.append(
                _figures(
                    [real[a][:, a], made[drawn][:, drawn], between[drawn][:, a]],
                    [real_kernel[a][:, a], made_kernel[drawn][:, drawn], between_kernel[drawn][:, a]],
                    [independent_groups(self.n, self._groups[a]), independent_groups(self.n, groups[drawn])],
                )
            )
        return self._record(rows)

    def _record(self, rows: list[dict[str, float]]) -> dict[str, Any]:
        record: dict[str, Any] = {"n": self.n, "splits": SPLITS}
        for name in SPREAD_FIGURES:
            values = [row[name] for row in rows]
            record[name] = {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
        return record


def _chosen(groups: Tensor) -> Tensor:
    """The row numbers that take part: all, in their order, or whole groups at random up to the most there may be."""
    if len(groups) <= _MAX_ROWS:
        return torch.arange(len(groups))
    generator = torch.Generator().manual_seed(SPLITS)  # the splits have the seeds before it
    kinds, place = groups.unique(return_inverse=True)
    # Sorted by its group's place in a random order, a group is together.
    order = torch.randperm(len(kinds), generator=generator)[place].argsort(stable=True)
    return order[:_MAX_ROWS].sort().values


def _halves(groups: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two sets of row numbers, in random order; each group goes, in random order, to the side with fewer rows."""
    kinds, place = groups.unique(return_inverse=True)
    sizes, side = place.bincount().tolist(), torch.zeros(len(kinds), dtype=torch.bool)
    counts = [0, 0]
    for group in torch.randperm(len(kinds), generator=generator).tolist():
        second = counts[1] < counts[0]
        side[group] = second
        counts[second] += sizes[group]
    order = torch.randperm(len(groups), generator=generator)
    in_second = side[place[order]]
    return order[~in_second], order[in_second]


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    # From the differences, not from products: a row's distance to its copy is exactly 0.
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


def _figures(distances: list[Tensor], kernels: list[Tensor], groups: list[Tensor]) -> dict[str, float]:
    """The figures of n real and n made rows, from [real, real], [made, made] and [made, real] matrices.

    groups: int64 [n] of either side; the kernel distance leaves out pairs of one group.
    """
    real, made, between = distances
    n = len(real)
    # A row is its own first neighbor, so the k-th other one is the (k + 1)-th.
    manifolds = [side.kthvalue(MANIFOLD_K + 1, dim=1).values for side in (real, made)]
    balls = between < real.kthvalue(BALL_K + 1, dim=1).values
    within = [
        kernel.masked_fill(kinds[:, None] == kinds, 0).sum() / pairs_between(kinds)
        for kernel, kinds in zip(kernels[:2], groups, strict=True)
    ]
    return {
        "mmd": (within[0] + within[1] - 2 * kernels[2].mean()).item(),
        "precision": (between <= manifolds[0]).any(1).double().mean().item(),
        "recall": (manifolds[1] >= between.T).any(1).double().mean().item(),
        "density": balls.sum().item() / (BALL_K * n),
        "coverage": balls.any(0).double().mean().item(),
    }
