"""`composite_laplacian_loss`: from the generator's logits and rows of the clip table to the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import impl as switch
from ..checks import FLOATS, check_index, check_same_device, check_shape, check_tensor, check_whole
from ..laplacian.op import TRITON_SIZES, is_scaled_late, saved_times_upstream
from ..laplacian.pyramid import Pyramid
from ..launch import laid_out_as, operator, why_no_triton
from . import reference

NAME = "composite_laplacian_loss"

switch.register("composite_laplacian", "reference")
switch.register("composite_laplacian", "triton", why_no_triton)


def _launch(
    head: Tensor, background: Tensor, clips: Tensor, index: Tensor, frames: int, mask_weight: float,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (loss, grad_head, grad_background, video); what is not asked for is empty."""
    from . import kernel

    *fields, with_gradient, with_video = arguments
    options = Pyramid.of(fields)
    # The factor that the backward pass still applies.
    late = _gradient_unit(head, frames, options) if is_scaled_late(head) else 1.0
    return kernel.composite_laplacian_fwd(
        head, background, clips, index, frames, mask_weight, options, late, with_gradient, with_video
    )


def _fake(
    head: Tensor, background: Tensor, clips: Tensor, index: Tensor, frames: int, mask_weight: float,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *fields, with_gradient, with_video = arguments
    shape = (head.shape[0], 3, frames) if Pyramid.of(fields).reduction == "none" else ()
    return (
        head.new_empty(shape, dtype=torch.float32),
        laid_out_as(head, 4) if with_gradient else head.new_empty(0),
        laid_out_as(background, 3) if with_gradient else head.new_empty(0),
        head.new_empty((head.shape[0], 3, *head.shape[2:]) if with_video else (0,)),
    )


_composite_laplacian = operator(
    "composite_laplacian(Tensor head, Tensor background, Tensor clips, Tensor index, SymInt frames,"
    f" float mask_weight, {Pyramid.SCHEMA}, bool with_gradient, bool with_video)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)


def _gradient_unit(head: Tensor, frames: int, options: Pyramid) -> float:
    return options.gradient_unit(head.shape[-1], head.shape[0] * 3 * frames)


class _Loss(torch.autograd.Function):
    """(loss, video) with the gradients of the loss, which the forward pass makes."""

    @staticmethod
    def forward(
        ctx: Any, head: Tensor, background: Tensor, clips: Tensor, index: Tensor, frames: int,
        mask_weight: float, options: Pyramid, with_video: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        loss, grad_head, grad_background, video = _composite_laplacian(
            head, background, clips, index, frames, mask_weight, *options.fields(), True, with_video
        )
        ctx.save_for_backward(grad_head, grad_background)
        ctx.options = options
        ctx.frames = frames
        ctx.mark_non_differentiable(video)
        # The video has no gradient, not a tensor of zeros. torch.compile knows no such setting.
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        return loss, video

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_head = ctx.saved_tensors[0]
        factor = _gradient_unit(grad_head, ctx.frames, ctx.options) if is_scaled_late(grad_head) else 1.0
        gradients = saved_times_upstream(ctx, NAME, upstream, factor)
        return *gradients, *[None] * 6


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
    l1_weight: float = 0.0,
    l2_weight: float = 0.0,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`laplacian_pyramid_loss(mask_composite(head, background), clips[index])` plus the mask prior.

    head [B,4,T,H,W] and background [B,3,H,W] are logits of one floating dtype, clips [N,3,T,H,W] the uint8
    table of training clips, index int64 [B] the row of each video.

    frames         score only the first so many frames (1 to T; None: all)
    mask_weight    lambda: adds lambda * mean over videos of the mask mean ("sum": the sum over videos); the
                   mask of all frames counts. Must be 0 with reduction "none", whose values are per plane.
    return_video   also return the video [B,3,T,H,W], without gradient, in the dtype of `head`
    levels, blur, sigma, level_weights, target_range, reduction, l1_weight, l2_weight, impl   as in
                   `laplacian_pyramid_loss`; reduction "none" gives [B,3,frames]

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
    frames = total if frames is None else check_whole("frames", frames, 1, total)
    options = Pyramid.checked(
        head.shape[3:], levels, blur, sigma, level_weights, target_range, reduction, l1_weight, l2_weight
    )
    if not math.isfinite(mask_weight):
        raise ValueError(f"mask_weight: expected a finite number, got {mask_weight!r}")
    if mask_weight and reduction == "none":
        raise ValueError("mask_weight: expected 0 with reduction 'none', whose values are per plane")
    with_gradient = torch.is_grad_enabled() and (head.requires_grad or background.requires_grad)
    unsupported = _triton_refuses(head, reduction, with_gradient)
    if switch.chosen("composite_laplacian", impl, head.device, unsupported) == "triton":
        if with_gradient:
            loss, video = _Loss.apply(
                head, background, clips, index, frames, float(mask_weight), options, return_video
            )
        else:
            loss, _, _, video = _composite_laplacian(
                head, background, clips, index, frames, float(mask_weight), *options.fields(),
                False, return_video,
            )  # fmt: skip
        return (loss, video) if return_video else loss
    loss, video = reference.composite_laplacian_loss(
        head, background, clips, index, frames, mask_weight, options
    )
    return (loss, video.detach()) if return_video else loss
