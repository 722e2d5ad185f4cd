"""What `composite_laplacian_loss` computes: the two ops it joins, one after the other."""

from collections.abc import Sequence

from torch import Tensor

from ..composite import reference as composite
from ..laplacian import reference as laplacian


def composite_laplacian_loss(
    head: Tensor,
    background: Tensor,
    clips: Tensor,
    index: Tensor,
    *,
    frames: int,
    mask_weight: float,
    levels: int,
    blur: str,
    sigma: float,
    level_weights: Sequence[float],
    target_range: tuple[float, float],
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """(loss, video [B,3,T,H,W]): Laplacian loss of the first `frames` frames plus mask_weight * mask mean.

    The mask term is a mean or a sum over videos, as `reduction` says; it covers all frames. Arguments are
    described at `vglann_kernels.composite_laplacian_loss`; all are required here.
    """
    video, mask_mean = composite.mask_composite(head, background)  # [B,3,T,H,W], [B]
    loss = laplacian.laplacian_pyramid_loss(
        video[:, :, :frames],
        clips[index][:, :, :frames],
        levels=levels,
        blur=blur,
        sigma=sigma,
        level_weights=level_weights,
        target_range=target_range,
        reduction=reduction,
    )
    if mask_weight:
        loss = loss + mask_weight * (mask_mean.mean() if reduction == "mean" else mask_mean.sum())
    return loss, video
