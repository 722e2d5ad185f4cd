"""Reconstruction losses: how far generated videos are from uint8 clips.

The sum that `options.loss` names. Losses by the features of a network come from `perceptual.py`, which loads it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from vglann_kernels import composite_laplacian_loss, laplacian_pyramid_loss, mask_composite

from vglann_fast.clips.pixels import to_range
from vglann_fast.glo.loader import Batch
from vglann_fast.glo.perceptual import FeatureLoss, TargetLoss
from vglann_fast.options.training import TrainOptions

# Losses that one op computes together.
FUSED = {"laplacian", "l1", "l2"}


def glo_loss(
    head: Tensor | None,
    background: Tensor,
    batch: Batch,
    options: TrainOptions,
    features: Mapping[str, FeatureLoss] | None = None,
    *,
    with_video: bool,
) -> tuple[Tensor, Tensor | None]:
    """Logits of a batch -> (its loss [], with the mask prior; video [B, 3, T, H, W] detached, or None).

    One fused op where there is one: Laplacian loss, also with L1 and L2, against uint8 clips, whose rows it reads
    from the table.
    The same numbers otherwise, from one op after the other; that path takes floating-point clips, too.

    Args:
        head, background: what `TwoStreamGenerator.logits` gives. Without a head the background alone is compared
            with each clip's mean frame, and the video has one frame.
        features: of `load_features(options, ...)`, where the loss names a network.
        with_video: the fused op writes the video only when asked.
    """
    if head is None:
        still = torch.tanh(_in_float32(background))[:, :, None]  # [B, 3, 1, H, W]
        target = mean_frames(batch.clips[batch.at], still.dtype, options.target_limits)
        return reconstruction_loss(still, target, options), still.detach() if with_video else None
    terms = options.loss_terms.keys()
    if "laplacian" in terms and terms <= FUSED and batch.clips.dtype == torch.uint8:
        return _fused_loss(head, background, batch, options, with_video)
    clips = batch.clips[batch.at]
    against = {name: loss.against(clips, batch.rows) for name, loss in (features or {}).items()}
    video, mask_mean = mask_composite(head, background)
    loss = reconstruction_loss(video, clips, options, against)
    if options.mask_weight:
        loss = loss + options.mask_weight * mask_mean.mean()
    return loss, video.detach() if with_video else None


def mean_frames(clips: Tensor, dtype: torch.dtype, limits: tuple[float, float]) -> Tensor:
    """Clips [B, 3, T, H, W], uint8 or in `limits` already -> their mean frames [B, 3, 1, H, W] in `limits`."""
    mean = clips.mean(2, keepdim=True, dtype=dtype)
    low, high = limits
    return mean if clips.is_floating_point() else mean * ((high - low) / 255.0) + low


def _in_float32(video: Tensor) -> Tensor:
    """16-bit values as float32; float64 stays."""
    return video.to(torch.promote_types(video.dtype, torch.float32))


def _fused_loss(
    head: Tensor, background: Tensor, batch: Batch, options: TrainOptions, with_video: bool
) -> tuple[Tensor, Tensor | None]:
    frames = head.shape[2]
    summed = frames - 1 if options.frame_reduction == "sum-but-last" else None
    # The op takes the mean over frames. As weights of the terms the factor costs nothing; on the loss it would have
    # the backward pass multiply the whole gradient.
    laplacian, l1, l2 = (
        (summed or 1) * options.loss_terms.get(name, 0.0) for name in ("laplacian", "l1", "l2")
    )
    result = composite_laplacian_loss(
        head,
        background.to(head.dtype),
        batch.clips,
        batch.at,
        frames=summed,
        mask_weight=options.mask_weight,
        return_video=with_video,
        levels=options.levels,
        blur=options.blur,
        level_weights=[laplacian] * (options.levels + 1),
        target_range=options.target_limits,
        l1_weight=l1,
        l2_weight=l2,
    )
    return result if isinstance(result, tuple) else (result, None)


def reconstruction_loss(
    video: Tensor, clips: Tensor, options: TrainOptions, against: "Mapping[str, TargetLoss] | None" = None
) -> Tensor:
    """The weighted sum of losses that `options.loss` names.

    Args:
        video: [B, 3, T, H, W] floating, the generator's output; half precision is compared in float32.
        clips: [B, 3, T, H, W] uint8, mapped to `options.target_limits`, or floating and in that range.
        against: `FeatureLoss.against(clips)` of each network that the loss names.

    Returns:
        A scalar: means over all clips and frames or, with frame_reduction="sum-but-last", the author's sums over
        all frames but the last. "laplacian": sum over pyramid bands of the mean absolute difference, see
        `vglann_kernels`. "l1": mean absolute difference. "l2": mean squared difference. "motion": the same of what
        each frame adds to its video's mean frame; motion R² is one minus this, over the clips' own. Networks:
        `FeatureLoss`.
    """
    video = _in_float32(video)
    terms = []
    for name, weight in options.loss_terms.items():
        loss = (
            against[name](video) if against and name in against else _pixel_loss(name, video, clips, options)
        )
        terms.append(weight * loss)
    return torch.stack(terms).sum()


def _pixel_loss(name: str, video: Tensor, clips: Tensor, options: TrainOptions) -> Tensor:
    """The loss `name`, of those that need no network."""
    scored = options.scored_frames(video.shape[2])
    made, real = video[:, :, :scored], clips[:, :, :scored]
    if name == "laplacian":
        loss = laplacian_pyramid_loss(
            made,
            real,
            levels=options.levels,
            blur=options.blur,
            target_range=options.target_limits,
        )
    else:
        difference = made - to_range(real, made.dtype, options.target_limits)
        if name == "motion":
            difference = difference - difference.mean(2, keepdim=True)
        loss = difference.abs().mean() if name == "l1" else difference.square().mean()
    return loss if options.frame_reduction == "mean" else scored * loss
