"""The options of the Laplacian loss as one value, checked once and passed around whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..checks import check_whole

BLURS = ("binomial", "gaussian", "paper")
FORMER_BLURS = {"seed": "paper"}
REDUCTIONS = ("none", "mean", "sum")
MAX_LEVELS = 5


def blur_name(blur: str) -> str:
    """Return the name of a blur today; earlier names are accepted, without a warning that would break a graph."""
    return FORMER_BLURS.get(blur, blur)


@dataclass(frozen=True)
class Pyramid:
    """Levels, blur and weights of the pyramid, the range that uint8 targets stand for, and the reduction.

    `weights` has levels + 1 values, the residual's last. `l1_weight` and `l2_weight` are of the plain mean absolute
    and mean squared difference. See `vglann_kernels.laplacian_pyramid_loss`.
    """

    levels: int
    blur: str
    sigma: float
    weights: tuple[float, ...]
    target_range: tuple[float, float]
    reduction: str
    l1_weight: float = 0.0
    l2_weight: float = 0.0

    # The fields as arguments of an operator.
    SCHEMA: ClassVar[str] = (
        "int levels, str blur, float sigma, float[] weights, float[] target_range, str reduction,"
        " float l1_weight, float l2_weight"
    )

    @classmethod
    def of(cls, fields: Sequence[Any]) -> Pyramid:
        """Return the options from an operator's arguments."""
        levels, blur, sigma, weights, (low, high), *rest = fields
        return cls(levels, blur, sigma, tuple(weights), (low, high), *rest)

    def fields(self) -> tuple[Any, ...]:
        """Return the options as arguments of an operator."""
        pyramid = (self.levels, self.blur, self.sigma, self.weights, self.target_range, self.reduction)
        return *pyramid, self.l1_weight, self.l2_weight

    @classmethod
    def checked(
        cls,
        planes: Sequence[int],
        levels: int,
        blur: str,
        sigma: float,
        level_weights: Sequence[float] | None,
        target_range: tuple[float, float],
        reduction: str,
        l1_weight: float = 0.0,
        l2_weight: float = 0.0,
    ) -> Pyramid:
        """Return the options of the loss for planes of (height, width). Raises ValueError on a bad option."""
        height, width = planes
        blur = blur_name(blur)
        levels = check_whole("levels", levels, 1, MAX_LEVELS)
        if min(height, width) >> levels < 1:
            raise ValueError(f"levels: a plane of {height}x{width} does not survive {levels} halvings")
        if blur not in BLURS:
            raise ValueError(f"blur: expected one of {', '.join(BLURS)}, got {blur!r}")
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"sigma: expected a positive number of pixels, got {sigma!r}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if len(target_range) != 2 or not all(math.isfinite(limit) for limit in target_range):
            raise ValueError(f"target_range: expected two finite numbers, got {target_range!r}")
        weights = (1.0,) * (levels + 1) if level_weights is None else tuple(map(float, level_weights))
        if len(weights) != levels + 1 or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"level_weights: expected {levels + 1} finite numbers, got {level_weights!r}")
        for name, weight in (("l1_weight", l1_weight), ("l2_weight", l2_weight)):
            if not math.isfinite(weight):
                raise ValueError(f"{name}: expected a finite number, got {weight!r}")
        low, high = map(float, target_range)
        pixels = (float(l1_weight), float(l2_weight))
        return cls(levels, blur, float(sigma), weights, (low, high), reduction, *pixels)

    def reduced(self, values: Tensor) -> Tensor:
        """Return the mean or the sum of the values, or with reduction "none" the values."""
        if self.reduction == "none":
            return values
        return values.mean() if self.reduction == "mean" else values.sum()

    def kernel_weights(self) -> tuple[float, ...]:
        """Return w_l 4^l / unit for each level l, then l1_weight / unit and l2_weight / unit."""
        unit = self._unit()
        weights = tuple(weight * 4.0**level / unit for level, weight in enumerate(self.weights))
        return *weights, self.l1_weight / unit, self.l2_weight / unit

    def gradient_unit(self, size: int, planes: int) -> float:
        """Return the share of one kernel weight times one value in the reduced loss of `planes` planes."""
        share = self._unit() / size**2
        return share / max(planes, 1) if self.reduction == "mean" else share

    def _unit(self) -> float:
        """Make the largest kernel weight 512.

        The adjoint at most quadruples it, which float16 holds, and the weights of the finest levels stay far from
        float16's smallest numbers. The gradient of the squared difference is its weight times twice the difference:
        float16 holds differences up to 200.
        """
        levels = [abs(weight) * 4.0**level for level, weight in enumerate(self.weights)]
        return max(*levels, abs(self.l1_weight), 4 * abs(self.l2_weight)) / 512 or 1.0
