"""The kernel distance between two sets of features: squared maximum mean discrepancy, unbiased, in float64.

With the kernel of Bińkowski et al. 2018 (KID), k(x, y) = (x·y / d + 1)³, over real rows x and generated rows y:

    mean of k(x, x') over pairs of different rows + the same for y - 2 mean of k(x, y) over all pairs

Over independent rows of one distribution the mean of this estimate is 0 whatever n is, so it may be negative. A
Fréchet distance of n < d rows has a large bias instead, and the bias is smaller for a set of too little spread.

Clips of one shot are not independent: they are alike, so their pairs raise the first mean. Where the shots of a side
are given, pairs of one shot are left out of it, and the mean is 0 again for shots that are independent. Without shots
rows are taken as independent. The generated side has shots where it stands for real clips: training clips, or what is
decoded from their latents.

The standard error comes from `BLOCKS` = 10 disjoint blocks of each side: the standard deviation of their distances
over the square root of 10. Rows are taken in their order, n // 10 a block, and shots are kept whole. A block with
fewer than 2 rows of a side, or 2 shots, gives no error. A block has fewer pairs than a tenth of all, so
between sets of one distribution the error is too large on average, by a factor of about 3 (√10), and of 4 with 2 or
3 shots in a block. It can be too small where shots are not independent, such as shots of one video. It is the error
of one distance: two sources compared with the same real rows share much of it, and the error of their difference is
smaller.

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
# Features [n, d], and the shot of each row, int64 [n].
_Side = tuple[Tensor, Tensor]


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y / d + 1)³ of rows [n, d] and [m, d]: [n, m]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def square_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y / d)² of rows [n, d] and [m, d]: [n, m]."""
    return (x @ y.T / x.shape[1]) ** 2


def kernel_distance(
    real: Tensor | np.ndarray,
    generated: Tensor | np.ndarray,
    shots: Tensor | None = None,
    generated_shots: Tensor | None = None,
) -> dict[str, Any]:
    """The unbiased distance of features [n, d] and [m, d], and its standard error.

    Memory beside the features: one block of 512 rows against all rows of a side.

    Args:
        real: features [n, d].
        generated: features [m, d].
        shots: int64 [n], the shot of each real row. None, or all of one shot: rows are taken as independent.
        generated_shots: the same of the generated rows, int64 [m].

    Returns {"mmd": float, "mmd_error": float or None}. Raises `VglannError` for features that are not finite [n, d],
    fewer than 2 rows, another d, or numbers so large that the kernel overflows.
    """
    real, generated = _pair(real, generated)
    sides = (
        (real, independent_groups(len(real), shots)),
        (generated, independent_groups(len(generated), generated_shots)),
    )
    return {"mmd": _finite(_unbiased(*sides)), "mmd_error": _standard_error(*sides)}


def jedi_distance(real: Tensor | np.ndarray, generated: Tensor | np.ndarray) -> float:
    """The statistic that JEDi publishes, of features [n, d] and [m, d]. Raises as `kernel_distance`."""
    real, generated = _pair(real, generated)
    n, m = len(real), len(generated)
    within = _sum(real, real, square_kernel) / n**2 + _sum(generated, generated, square_kernel) / m**2
    between = _sum(real, generated, square_kernel) / (n * m)
    return _finite(100 * (within - 2 * between).item())


def independent_groups(n: int, shots: Tensor | None = None) -> Tensor:
    """The group of each of n rows, int64 [n]: its shot; itself where shots are unknown or all of one shot."""
    if shots is None or (shots == shots[0]).all():
        return torch.arange(n)
    return shots.cpu()


def pairs_between(groups: Tensor) -> int:
    """The number of ordered pairs of rows that are not of one group."""
    sizes = groups.unique(return_counts=True)[1]
    return len(groups) ** 2 - int(sizes.square().sum())


def _unbiased(real: _Side, generated: _Side) -> float:
    within = [
        _sum(rows, rows, cubic_kernel, groups) / pairs_between(groups) for rows, groups in (real, generated)
    ]
    between = _sum(real[0], generated[0], cubic_kernel) / (len(real[0]) * len(generated[0]))
    return (within[0] + within[1] - 2 * between).item()


def _standard_error(real: _Side, generated: _Side) -> float | None:
    places, others = _places(real[1]), _places(generated[1])
    if places is None or others is None:
        return None
    values = [
        _unbiased((real[0][at], real[1][at]), (generated[0][there], generated[1][there]))
        for at, there in zip(places, others, strict=True)
    ]
    return float(np.std(values, ddof=1)) / BLOCKS**0.5


def _places(groups: Tensor) -> list[Tensor] | None:
    """The rows of each block: whole groups, at least two; None if there are too few.

    Groups of one row are cut in their order. Others are dealt out, the largest first, so blocks are of nearly one
    size.
    """
    _, place, sizes = groups.unique(return_inverse=True, return_counts=True)
    if len(sizes) < 2 * BLOCKS:
        return None
    if len(sizes) == len(groups):
        size = len(groups) // BLOCKS
        return list(torch.arange(size * BLOCKS).split(size))
    rank = torch.empty_like(sizes)
    rank[sizes.argsort(descending=True, stable=True)] = torch.arange(len(sizes))
    block = rank[place] % BLOCKS
    return [(block == number).nonzero()[:, 0] for number in range(BLOCKS)]


def _sum(x: Tensor, y: Tensor, kernel: Kernel, groups: Tensor | None = None) -> Tensor:
    """The sum [] of the kernel over all pairs of rows; of one set with `groups`, over pairs not of one group."""
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(x), _CHUNK):
        block = kernel(x[start : start + _CHUNK], y)
        if groups is not None:
            block.masked_fill_(groups[start : start + _CHUNK, None] == groups, 0)
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
