"""The kernel distance between two sets of features: squared maximum mean discrepancy, unbiased, in float64.

With the kernel of Bińkowski et al. 2018 (KID), k(x, y) = (x·y / d + 1)³, over real rows x and generated rows y:

    mean of k(x, x') over pairs of different rows + the same for y - 2 mean of k(x, y) over all pairs

The estimate is a U-statistic: over sets of one distribution its mean is 0 whatever n is, so it may be negative. A
Fréchet distance of n < d rows has a large bias instead, and the bias is smaller for a set of too little spread.

The standard error comes from `BLOCKS` = 10 disjoint blocks of n // 10 rows of each side, in the order of the rows:
the standard deviation of their distances over the square root of 10. With fewer than 2 rows in a block there is
none. A block has fewer pairs than a tenth of all, so between sets of one distribution the error is too large by up
to a factor of 3 (√10), and never too small.

JEDi (github.com/oooolga/JEDi) publishes another statistic of the same family: kernel (x·y / d)², with the pairs of
a row and itself, which biases it upward, times 100.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.metrics.frechet import check_features

BLOCKS = 10
JEDI_VIDEOS = 5000  # on each side, in the published protocol
_CHUNK = 512  # rows against all others at a time: 40 MB for 10,000 of them

Kernel = Callable[[Tensor, Tensor], Tensor]


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y / d + 1)³ of rows [n, d] and [m, d]: [n, m]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def square_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y / d)² of rows [n, d] and [m, d]: [n, m]."""
    return (x @ y.T / x.shape[1]) ** 2


def kernel_distance(real: Tensor | np.ndarray, generated: Tensor | np.ndarray) -> dict[str, Any]:
    """The unbiased distance of features [n, d] and [m, d], and its standard error.

    Memory beside the features: one block of 512 rows against all rows of a side.

    Returns {"mmd": float, "mmd_error": float or None}. Raises `VglannError` for features that are not finite [n, d],
    fewer than 2 rows, another d, or numbers so large that the kernel overflows.
    """
    real, generated = _pair(real, generated)
    return {"mmd": _finite(_unbiased(real, generated)), "mmd_error": _standard_error(real, generated)}


def jedi_distance(real: Tensor | np.ndarray, generated: Tensor | np.ndarray) -> float:
    """The statistic that JEDi publishes, of features [n, d] and [m, d]. Raises as `kernel_distance`."""
    real, generated = _pair(real, generated)
    n, m = len(real), len(generated)
    within = _sum(real, real, square_kernel) / n**2 + _sum(generated, generated, square_kernel) / m**2
    between = _sum(real, generated, square_kernel) / (n * m)
    return _finite(100 * (within - 2 * between).item())


def unbiased_from_sums(real: Tensor, generated: Tensor, between: Tensor, n: int, m: int) -> Tensor:
    """The unbiased distance, from sums of the kernel over different rows of a side, and over all pairs between."""
    return real / (n * (n - 1)) + generated / (m * (m - 1)) - 2 * between / (n * m)


def _unbiased(real: Tensor, generated: Tensor) -> float:
    n, m = len(real), len(generated)
    real_sum, generated_sum = (
        _sum(rows, rows, cubic_kernel, without_diagonal=True) for rows in (real, generated)
    )
    return unbiased_from_sums(real_sum, generated_sum, _sum(real, generated, cubic_kernel), n, m).item()


def _standard_error(real: Tensor, generated: Tensor) -> float | None:
    sizes = len(real) // BLOCKS, len(generated) // BLOCKS
    if min(sizes) < 2:
        return None
    blocks = zip(real.split(sizes[0])[:BLOCKS], generated.split(sizes[1])[:BLOCKS], strict=True)
    values = [_unbiased(*block) for block in blocks]
    return float(np.std(values, ddof=1)) / BLOCKS**0.5


def _sum(x: Tensor, y: Tensor, kernel: Kernel, *, without_diagonal: bool = False) -> Tensor:
    """The sum [] of the kernel over all pairs of rows, or of different rows of one set."""
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(x), _CHUNK):
        block = kernel(x[start : start + _CHUNK], y)
        if without_diagonal:
            block.diagonal(start).zero_()
        total += block.sum()
    return total


def _pair(real: Tensor | np.ndarray, generated: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    real, generated = check_features(real), check_features(generated)
    if real.shape[1] != generated.shape[1]:
        raise VglannError(
            f"real features have {real.shape[1]} numbers, generated ones {generated.shape[1]}; "
            "take both from one network"
        )
    for name, rows in (("real", real), ("generated", generated)):
        if len(rows) < 2:
            raise VglannError(f"a kernel distance needs at least 2 {name} videos, got {len(rows)}")
    return real, generated


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise VglannError("the kernel distance overflows: divide both sets of features by one large number")
    return value
