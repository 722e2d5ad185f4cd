"""`composite_laplacian_loss`: from the generator's logits and rows of the clip table to the loss."""

import math
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from .. import impl as switch
from ..checks import FLOATS, check_index, check_same_device, check_shape, check_tensor
from ..laplacian.op import TRITON_SIZES, saved_times_upstream
from ..laplacian.pyramid import Pyramid
from ..launch import laid_out_as, why_no_triton
from . import reference

switch.register("composite_laplacian", "reference")
switch.register("composite_laplacian", "triton", why_no_triton)


@torch.library.custom_op("vglann_kernels::composite_laplacian", mutates_args=())
def _composite_laplacian(
    head: Tensor,
    background: Tensor,
    clips: Tensor,
    index: Tensor,
    frames: int,
    mask_weight: float,
    levels: int,
    blur: str,
    sigma: float,
    level_weights: Sequence[float],
    target_range: Sequence[float],
    reduction: str,
    with_gradient: bool,
    with_video: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, grad_head, grad_background, video); what is not asked for is empty."""
    from . import kernel

    low, high = target_range
    options = Pyramid(levels, blur, sigma, tuple(level_weights), (low, high), reduction)
    unit = _gradient_unit(head, frames, options.weights, reduction)
    # The factor that `_backward` still applies.
    late = unit if head.dtype == torch.float16 else 1.0
    values = head.numel() // 4 if reduction == "mean" else head.shape[2:].numel()
    prior = mask_weight / max(values, 1)
    losses, mask_mean, grad_head, grad_background, video = kernel.composite_laplacian_fwd(
        head, background, clips, index, frames, prior / late, options, unit / late, with_gradient, with_video
    )
    loss = options.reduced(losses)
    if mask_weight:
        loss = loss + mask_weight * options.reduced(mask_mean)
    return loss, grad_head, grad_background, video


def _gradient_unit(head: Tensor, frames: int, weights: tuple[float, ...], reduction: str) -> float:
    from ..laplacian.kernel import gradient_unit

    return gradient_unit(head[:, :3, :frames], weights, reduction)


@_composite_laplacian.register_fake
def _(
    head: Tensor, background: Tensor, clips: Tensor, index: Tensor, frames: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, reduction, with_gradient, with_video = options
    shape = (head.shape[0], 3, frames) if reduction == "none" else ()
    return (
        head.new_empty(shape, dtype=torch.float32),
        laid_out_as(head, 4) if with_gradient else head.new_empty(0),
        laid_out_as(background, 3) if with_gradient else head.new_empty(0),
        laid_out_as(head, 3) if with_video else head.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    head, frames, weights, reduction = inputs[0], inputs[4], inputs[9], inputs[11]
    ctx.save_for_backward(output[1], output[2])
    ctx.factor = 1.0
    if head.dtype == torch.float16:  # its gradients were left in large units, which float16 can hold
        ctx.factor = _gradient_unit(head, frames, tuple(weights), reduction)


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_head, grad_background = saved_times_upstream(ctx, grad_loss, ctx.factor)
    return grad_head, grad_background, *[None] * 12


_composite_laplacian.register_autograd(_backward, setup_context=_save)


def _triton_refuses(head: Tensor, reduction: str, with_gradient: bool) -> str | None:
    height, width = head.shape[3:]
    if height != width or height not in TRITON_SIZES:
        sizes = ", ".join(map(str, TRITON_SIZES))
        return f"head: expected square planes of {sizes}, got {height}x{width}"
    if head.dtype == torch.float64:
        return "head: expected a 16- or 32-bit float, got float64"
    if reduction == "none" and with_gradient:
        return "reduction: 'none' has a value per plane and no gradient by the logits; expected mean or sum"
    return None


def composite_laplacian_loss(
    head: Tensor,
    background: Tensor,
    clips: Tensor,
    index: Tensor,
    *,
    frames: int | None = None,
    mask_weight: float = 0.0,
    return_video: bool = False,
    levels: int = 3,
    blur: str = "binomial",
    sigma: float = 2.0,
    level_weights: Sequence[float] | None = None,
    target_range: tuple[float, float] = (-1.0, 1.0),
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`laplacian_pyramid_loss(mask_composite(head, background), clips[index])` plus the mask prior.

    head [B,4,T,H,W] and background [B,3,H,W] are logits of one floating dtype, clips [N,3,T,H,W] the uint8
    table of training clips, index int64 [B] the row of each video.

    frames         score only the first so many frames (1 to T; None: all)
    mask_weight    lambda: adds lambda * mean over videos of the mask mean ("sum": the sum over videos); the
                   mask of all frames counts. Must be 0 with reduction "none", whose values are per plane.
    return_video   also return the video [B,3,T,H,W], without gradient, in the dtype of `head`
    levels, blur, sigma, level_weights, target_range, reduction, impl   as in `laplacian_pyramid_loss`;
                   reduction "none" gives [B,3,frames]

    The loss is float32 (float64 for float64 logits), differentiable in `head` and `background`.
    Raises TypeError on a wrong dtype; ValueError on a wrong shape, mixed devices, a bad index or option.
    """
    check_tensor("head", head, FLOATS)
    check_tensor("background", background, (head.dtype,))
    check_tensor("clips", clips, (torch.uint8,))
    check_tensor("index", index, (torch.int64,))
    check_shape("head", head, ("B", 4, "T", "H", "W"))
    check_shape("background", background, (head.shape[0], 3, *head.shape[3:]))
    check_shape("clips", clips, ("N", 3, *head.shape[2:]))
    check_shape("index", index, (head.shape[0],))
    for name, value in (("background", background), ("clips", clips), ("index", index)):
        check_same_device("head", head, name, value)
    check_index("index", index, clips.shape[0])
    total = head.shape[2]
    frames = total if frames is None else frames
    if isinstance(frames, bool) or not isinstance(frames, int) or not 1 <= frames <= total:
        raise ValueError(f"frames: expected an integer from 1 to {total}, got {frames!r}")
    options = Pyramid.checked(head.shape[3:], levels, blur, sigma, level_weights, target_range, reduction)
    if not math.isfinite(mask_weight):
        raise ValueError(f"mask_weight: expected a finite number, got {mask_weight!r}")
    if mask_weight and reduction == "none":
        raise ValueError("mask_weight: expected 0 with reduction 'none', whose values are per plane")
    with_gradient = torch.is_grad_enabled() and (head.requires_grad or background.requires_grad)
    unsupported = _triton_refuses(head, reduction, with_gradient)
    if switch.chosen("composite_laplacian", impl, head.device, unsupported) == "triton":
        loss, _, _, video = torch.ops.vglann_kernels.composite_laplacian(
            head, background, clips, index, frames, float(mask_weight), *astuple(options),
            with_gradient, return_video,
        )  # fmt: skip
        return (loss, video.detach()) if return_video else loss
    loss, video = reference.composite_laplacian_loss(
        head,
        background,
        clips,
        index,
        frames,
        mask_weight,
        options,
    )
    return (loss, video.detach()) if return_video else loss
