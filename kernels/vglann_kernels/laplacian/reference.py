"""`laplacian_pyramid_loss` in plain PyTorch: the definition."""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import compute_dtype
from .pyramid import Pyramid

Taps = list[float]


def blur_taps(blur: str, sigma: float, size: int = 5) -> list[tuple[Taps, Taps]]:
    """Return the blur as separable terms (column taps, row taps): K = sum of outer products, all entries sum to 1.

    binomial   [1 4 6 4 1] / 16 in both directions (Burt and Adelson 1983); size 5 only
    gaussian   exp(-x^2 / (2 sigma^2)) normalized, in both directions
    paper      K_ij proportional to g_i + g_j with g_i = exp(-x_i^2 / sigma^2): a sum where the usual kernel
               has a product, so two terms (g, box) and (box, g). `sigma` is in pixels throughout.
    """
    offsets = [i - size // 2 for i in range(size)]
    if blur == "binomial":
        taps = [math.comb(4, i) / 16 for i in range(5)]
        return [(taps, taps)]
    width = 2 * sigma * sigma if blur == "gaussian" else sigma * sigma
    g = [math.exp(-x * x / width) for x in offsets]
    g = [v / sum(g) for v in g]
    if blur == "gaussian":
        return [(g, g)]
    # Half of the box: the two terms together sum to 1.
    box = [0.5 / size] * size
    return [(g, box), (box, g)]


def band_matrix(n: int, taps: Taps, like: Tensor) -> Tensor:
    """Return B [n,n] such that B @ column is the column filtered with `taps`, its edge values replicated."""
    # On the device: a matrix copied there would make every loss wait for the host, and no graph could capture it.
    matrix = torch.zeros(n, n, dtype=torch.float64, device=like.device)
    reach = len(taps) // 2
    rows = torch.arange(-reach, n + reach, device=like.device).clamp(0, n - 1)
    impulses = torch.eye(n, dtype=torch.float64, device=like.device)[rows]  # [n + 2 reach, n]
    for i, tap in enumerate(taps):
        matrix += tap * impulses[i : i + n]
    return matrix.to(like.dtype)


def blurred(planes: Tensor, terms: list[tuple[Taps, Taps]]) -> Tensor:
    """Filter each plane of planes [P,H,W] with the sum of the separable terms."""
    height, width = planes.shape[-2:]
    out = torch.zeros_like(planes)
    for column_taps, row_taps in terms:
        rows_done = planes @ band_matrix(width, row_taps, planes).T  # [P,H,W]
        out = out + band_matrix(height, column_taps, planes) @ rows_done
    return out


def pyramid(planes: Tensor, levels: int, terms: list[tuple[Taps, Taps]]) -> list[Tensor]:
    """Return `levels` bands of planes [P,H,W] and the residual: level l is [P, H >> l, W >> l]."""
    bands = []
    for _ in range(levels):
        low = blurred(planes, terms)
        bands.append(planes - low)
        # [P,H//2,W//2]; an odd last row or column is dropped.
        planes = F.avg_pool2d(low[:, None], 2)[:, 0]
    return [*bands, planes]


def laplacian_pyramid_loss(video: Tensor, target: Tensor, options: Pyramid) -> Tensor:
    """Return the sum over levels of weight * mean |band of (video - target)| per plane, reduced.

    The plain mean absolute and mean squared difference are added with their weights. Planes are the last two
    dimensions. The pyramid is linear, so the pyramid of the difference is the difference of the pyramids.
    Arguments, dtypes and the reductions are described at `vglann_kernels.laplacian_pyramid_loss`.
    """
    dtype = compute_dtype(video)
    # The products below must stay in float32. Autocast does not know meta tensors.
    with nullcontext() if video.is_meta else torch.autocast(video.device.type, enabled=False):
        y = target.to(dtype)
        if target.dtype == torch.uint8:
            low, high = options.target_range
            y = low + (high - low) / 255 * y
        difference = video.to(dtype) - y
        difference = difference.flatten(0, -3) if video.ndim > 2 else difference[None]
        bands = pyramid(difference, options.levels, blur_taps(options.blur, options.sigma))
        per_plane = torch.stack(
            [w * band.abs().mean(dim=(1, 2)) for w, band in zip(options.weights, bands, strict=True)]
        ).sum(0)  # [P]
        if options.l1_weight:
            per_plane = per_plane + options.l1_weight * difference.abs().mean(dim=(1, 2))
        if options.l2_weight:
            per_plane = per_plane + options.l2_weight * difference.square().mean(dim=(1, 2))
    return options.reduced(per_plane.reshape(video.shape[:-2]))
