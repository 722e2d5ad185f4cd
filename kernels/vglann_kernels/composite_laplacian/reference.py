"""`composite_laplacian_loss` in plain PyTorch: the two ops that it joins, one after the other."""

from torch import Tensor

from ..composite import reference as composite
from ..laplacian import reference as laplacian
from ..laplacian.pyramid import Pyramid


def composite_laplacian_loss(
    head: Tensor,
    background: Tensor,
    clips: Tensor,
    index: Tensor,
    frames: int,
    mask_weight: float,
    options: Pyramid,
) -> tuple[Tensor, Tensor]:
    """Return (loss, video [B,3,T,H,W]): the Laplacian loss of the first `frames` frames plus the mask term.

    The mask term is mask_weight * the mask mean of all frames, reduced over videos. Arguments are described at
    `vglann_kernels.composite_laplacian_loss`.
    """
    video, mask_mean = composite.mask_composite(head, background)  # [B,3,T,H,W], [B]
    loss = laplacian.laplacian_pyramid_loss(video[:, :, :frames], clips[index][:, :, :frames], options)
    if mask_weight:
        loss = loss + mask_weight * options.reduced(mask_mean)
    return loss, video
