"""Reconstruction losses: how far generated videos are from uint8 clips.

Losses of perceptual features are elsewhere; these two need no weights.
"""

import torch
from torch import Tensor
from vglann_kernels import composite_laplacian_loss, laplacian_pyramid_loss, mask_composite

from vglann_fast.config import TrainOptions
from vglann_fast.glo.data import Batch


def glo_loss(
    head: Tensor, background: Tensor, batch: Batch, options: TrainOptions, *, with_video: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits of a batch -> (its loss [], with the mask prior; video [B, 3, T, H, W] detached, or None).

    One fused op where there is one: Laplacian loss against uint8 clips, whose rows it reads from the table. The
    same numbers otherwise, from one op after the other; that path takes floating-point clips, too.

    Args:
        head, background: what `TwoStreamGenerator.logits` gives.
        with_video: the fused op writes the video only when asked.
    """
    if options.loss == "laplacian" and batch.clips.dtype == torch.uint8:
        return _fused_loss(head, background, batch, options, with_video)
    video, mask_mean = mask_composite(head, background)
    loss = reconstruction_loss(video, batch.clips[batch.at], options)
    if options.mask_weight:
        loss = loss + options.mask_weight * mask_mean.mean()
    return loss, video.detach() if with_video else None


def _fused_loss(
    head: Tensor, background: Tensor, batch: Batch, options: TrainOptions, with_video: bool
) -> tuple[Tensor, Tensor | None]:
    frames = head.shape[2]
    summed = frames - 1 if options.frame_reduction == "sum-but-last" else None
    factor = summed or 1  # the op takes the mean over frames; the prior is not to be multiplied
    result = composite_laplacian_loss(
        head,
        background.to(head.dtype),
        batch.clips,
        batch.at,
        frames=summed,
        mask_weight=options.mask_weight / factor,
        return_video=with_video,
        levels=options.levels,
        blur=options.blur,
        target_range=options.target_limits,
    )
    loss, video = result if isinstance(result, tuple) else (result, None)
    return (loss if summed is None else factor * loss), video


def reconstruction_loss(video: Tensor, clips: Tensor, options: TrainOptions) -> Tensor:
    """Mean (or, with frame_reduction="sum-but-last", the author's sum over frames) of the loss of each frame.

    Args:
        video: [B, 3, T, H, W] floating, the generator's output.
        clips: [B, 3, T, H, W] uint8, mapped to `options.target_limits`.

    Returns:
        A scalar. "laplacian": sum over pyramid bands of the mean absolute difference, see `vglann_kernels`.
        "l1": mean absolute difference.
    """
    frames = video.shape[2]
    scored = frames if options.frame_reduction == "mean" else frames - 1
    video, clips = video[:, :, :scored], clips[:, :, :scored]
    if options.loss == "l1":
        loss = (video - to_range(clips, video.dtype, options.target_limits)).abs().mean()
    else:
        loss = laplacian_pyramid_loss(
            video, clips, levels=options.levels, blur=options.blur, target_range=options.target_limits
        )
    return loss if options.frame_reduction == "mean" else scored * loss


def to_range(clips: Tensor, dtype: torch.dtype, limits: tuple[float, float]) -> Tensor:
    """uint8 clips of any shape -> floating, with 0 mapped to limits[0] and 255 to limits[1]."""
    low, high = limits
    return clips.to(dtype) * ((high - low) / 255.0) + low


def to_uint8(video: Tensor, limits: tuple[float, float]) -> Tensor:
    """The inverse of `to_range`, rounded and clipped to 0..255."""
    low, high = limits
    return ((video.float() - low) * (255.0 / (high - low))).round_().clamp_(0, 255).byte()


def psnr(made: Tensor, real: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip: uint8 [B, ...] against uint8 [B, ...] -> float64 [B].

    10 log10(255^2 / mean squared difference) over all values of a clip; infinite for equal clips.
    """
    error = (made.double() - real.double()).square().flatten(1).mean(1)
    return 10.0 * (255.0**2 / error).log10()
