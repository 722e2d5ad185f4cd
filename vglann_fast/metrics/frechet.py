"""The Fréchet distance between two sets of features, in float64, from statistics that are streamed.

Between the Gaussians fitted to the sets (Fréchet 1957; for generated images, Heusel et al. 2017):

    |m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr sqrt(S1 S2),    S unbiased, divided by n - 1

With R^T R = (n - 1) S, Tr sqrt(S1 S2) is the nuclear norm of R1 R2^T over sqrt((n1 - 1)(n2 - 1)). No matrix is
squared and no root is taken of one, so it is right to rounding for singular covariances (n < d) as well, where
matrix square roots of products are not.

A distance of few samples is biased upward, the more so the fewer they are. Never average it over batches, never
draw with replacement, and compare only values of equal n. With n < 2 d it ranks samples of
too little spread before samples of the right distribution: it is marked then and never ranks anything.
"""

import numpy as np
import torch
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.metrics.judgment import frechet_is_doubtful

_SAME = 1e-9  # of the traces: samples of one distribution are never as near, whatever their number


class FeatureMoments:
    """Number, mean and scatter of feature rows; at most 3 d rows of d numbers are kept.

    The result depends on the rows alone, to rounding: not on their order, nor on how they were split into batches
    (`update`) or shards (`merge`). n: rows so far. mean: float64 [d].
    """

    def __init__(self, dimensions: int) -> None:
        self.n = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self._rows = torch.zeros(0, dimensions, dtype=torch.float64)  # rows^T rows is the scatter
        self._lowest, self._highest = self.mean + torch.inf, self.mean - torch.inf

    @classmethod
    def of(cls, features: Tensor | np.ndarray) -> "FeatureMoments":
        """The moments of features [n, d]. Raises as `check_features`."""
        features = check_features(features)
        moments = cls(features.shape[1])
        moments.update(features)
        return moments

    def update(self, features: Tensor | np.ndarray) -> None:
        """Add rows [n, d], n >= 0. Raises as `check_features`, and for another d."""
        features = check_features(features)
        if features.shape[1] != len(self.mean):
            raise VglannError(f"features of {features.shape[1]} numbers among features of {len(self.mean)}")
        if not len(features):
            return
        batch = FeatureMoments(len(self.mean))
        batch.n, batch.mean = len(features), features.mean(0)
        batch._rows = features - batch.mean
        batch._lowest, batch._highest = features.amin(0), features.amax(0)
        self.merge(batch)

    def merge(self, other: "FeatureMoments") -> None:
        """Add what another process has seen (Chan, Golub and LeVeque 1979). Raises `VglannError` for another d."""
        if len(other.mean) != len(self.mean):
            raise VglannError(f"features of {len(other.mean)} numbers among features of {len(self.mean)}")
        if not other.n:
            return
        n, shift = self.n + other.n, other.mean - self.mean
        between = shift * (self.n * other.n / n) ** 0.5
        self._rows = torch.cat([self._rows, other._rows, between[None]])
        if len(self._rows) > 2 * len(self.mean):  # seldom enough to be cheap
            self._rows = self.factor()
        self.n, self.mean = n, self.mean + shift * (other.n / n)
        self._lowest = torch.minimum(self._lowest, other._lowest)
        self._highest = torch.maximum(self._highest, other._highest)

    def factor(self) -> Tensor:
        """R, float64 [r, d] with r <= d and R^T R the sum of (x - mean)(x - mean)^T over the rows x."""
        if len(self._rows) <= len(self.mean):
            return self._rows
        return torch.linalg.qr(self._rows, mode="r").R

    @property
    def trace(self) -> float:
        """Tr S: the sum of the features' variances."""
        return (self._rows.square().sum() / (self.n - 1)).item()

    @property
    def constant(self) -> bool:
        """Return True if all rows are equal."""
        return bool((self._lowest == self._highest).all())


def frechet_distance(real: FeatureMoments, made: FeatureMoments) -> float:
    """The distance, 0 or more, in squared units of the features; symmetric.

    Raises `VglannError` for fewer than 2 rows, features that are all equal, or different numbers of features.
    """
    if len(real.mean) != len(made.mean):
        raise VglannError(f"real features have {len(real.mean)} numbers, generated ones {len(made.mean)}")
    for name, moments in (("real", real), ("generated", made)):
        if moments.n < 2:
            raise VglannError(f"a Fréchet distance needs at least 2 {name} videos, got {moments.n}")
        if moments.constant:
            raise VglannError(
                f"the features of all {moments.n} {name} videos are the same: not a distribution"
            )
    first, second = real.factor(), made.factor()
    overlap = torch.linalg.matrix_norm(first @ second.T, "nuc") / ((real.n - 1) * (made.n - 1)) ** 0.5
    apart = (real.mean - made.mean).square().sum()
    distance = (apart - 2 * overlap).item() + real.trace + made.trace
    return max(distance, 0.0)  # equal sets may come out at -1e-13


def frechet_warnings(real: FeatureMoments, made: FeatureMoments, distance: float) -> list[str]:
    """Return the reasons to doubt this distance, a line each: n < 2 d, unequal n, identical sets."""
    lines, d = [], len(real.mean)
    if frechet_is_doubtful(min(real.n, made.n), d):
        lines.append(
            f"{min(real.n, made.n)} videos for {d} features: the Fréchet distance is far too large and prefers "
            "samples of too little spread; compare kernel distances, or take at least "
            f"{2 * d} videos on each side"
        )
    if real.n != made.n:
        lines.append(
            f"{real.n} real and {made.n} generated videos: the distance is biased by the smaller number"
        )
    if distance <= _SAME * (real.trace + made.trace):
        lines.append("the real and the generated features are identical: was one set compared with itself?")
    return lines


def check_features(features: Tensor | np.ndarray) -> Tensor:
    """The features as float64 [n, d] on the CPU. Raises `VglannError` for another shape, NaN or infinity."""
    features = torch.as_tensor(features)
    if features.ndim != 2 or not features.shape[1]:
        raise VglannError(f"features: expected [videos, numbers], got shape {list(features.shape)}")
    features = features.detach().to("cpu", torch.float64)
    wrong = (~features.isfinite()).any(1).nonzero().flatten().tolist()
    if wrong:
        raise VglannError(
            f"features: NaN or infinity in {len(wrong)} of {len(features)} rows, first {wrong[0]}"
        )
    return features
