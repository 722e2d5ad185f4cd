"""`laplacian_pyramid_loss`: L1 between the Laplacian pyramids of two videos, plane by plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import impl as switch
from ..checks import FLOATS, check_same_device, check_shape, check_tensor
from ..launch import is_traced, operator, why_no_triton, without_second_derivative
from . import reference
from .pyramid import Pyramid

NAME = "laplacian_pyramid_loss"
TRITON_SIZES = (32, 64, 128)

switch.register("laplacian", "reference")
switch.register("laplacian", "triton", why_no_triton)


def _launch(video: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return (loss, gradient by `video`, in units where `is_scaled_late`); the gradient is empty if not asked for."""
    from . import kernel

    *fields, with_gradient = arguments
    options = Pyramid.of(fields)
    unit = options.gradient_unit(video.shape[-1], video.shape[:-2].numel())
    early = 1.0 if is_scaled_late(video) else unit
    losses, gradient = kernel.laplacian_fwd(video, target, options, early, with_gradient)
    return options.reduced(losses), gradient


def _fake(video: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, with_gradient = arguments
    shape = video.shape[:-2] if Pyramid.of(fields).reduction == "none" else ()
    gradient = torch.empty_like(video) if with_gradient else video.new_empty(0)
    return video.new_empty(shape, dtype=torch.float32), gradient


def is_scaled_late(gradient: Tensor) -> bool:
    """Return True if a gradient of this dtype is kept in large units until the backward pass: float16 holds those."""
    return gradient.dtype == torch.float16


_laplacian = operator(
    f"laplacian_pyramid(Tensor video, Tensor target, {Pyramid.SCHEMA}, bool with_gradient) -> (Tensor, Tensor)",
    _launch,
    _fake,
)


def _launch_scaling(gradients: list[Tensor], upstream: Tensor, factor: float) -> None:
    from . import kernel

    kernel.scale_gradients(gradients, upstream, factor)


_scale_gradients = operator(
    "scale_gradients(Tensor(a!)[] gradients, Tensor upstream, float factor) -> ()",
    _launch_scaling,
    lambda gradients, upstream, factor: None,
)


def saved_times_upstream(ctx: Any, name: str, upstream: Tensor, factor: float) -> tuple[Tensor, ...]:
    """Return the saved gradients * upstream * factor, for a loss that made its gradients in the forward pass.

    An eager backward pass scales the saved tensors themselves, which moves no data where the product is 1; so they
    are handed out once. A traced graph may not return memory it was given: there the product is written out, for
    the compiler to fuse with what follows. With create_graph=True it is new memory, too.
    """
    gradients = ctx.saved_tensors
    if is_traced(gradients[0]) or torch.is_grad_enabled():
        scale = (upstream * factor)[..., None, None] if upstream.ndim else upstream * factor
        scaled = tuple((gradient.float() * scale).to(gradient.dtype) for gradient in gradients)
        return without_second_derivative(name, scaled)
    if getattr(ctx, "handed_out", False):
        raise RuntimeError(
            f"{name}: the Triton loss made its gradient in the forward pass and hands it out once; "
            "call the loss again instead of using retain_graph=True, or use impl='reference'"
        )
    ctx.handed_out = True
    _scale_gradients(gradients, upstream, factor)
    return gradients


class _Loss(torch.autograd.Function):
    """The loss with its gradient, which the one launch of the forward pass makes."""

    @staticmethod
    def forward(ctx: Any, video: Tensor, target: Tensor, options: Pyramid) -> Tensor:
        loss, gradient = _laplacian(video, target, *options.fields(), True)
        ctx.save_for_backward(gradient)
        ctx.options = options
        ctx.target_dtype = target.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        factor = 1.0
        if is_scaled_late(gradient):
            factor = ctx.options.gradient_unit(gradient.shape[-1], gradient.shape[:-2].numel())
        (gradient,) = saved_times_upstream(ctx, NAME, upstream, factor)
        by_video = gradient if ctx.needs_input_grad[0] else None
        by_target = -gradient.to(ctx.target_dtype) if ctx.needs_input_grad[1] else None
        return by_video, by_target, None


def triton_refuses(video: Tensor) -> str | None:
    """Return the reason why the kernel does not take the planes of `video`, or None when it does."""
    height, width = video.shape[-2:]
    if height != width or height not in TRITON_SIZES:
        sizes = ", ".join(map(str, TRITON_SIZES))
        return f"video: expected square planes of {sizes}, got {height}x{width}"
    return "video: expected a 16- or 32-bit float, got float64" if video.dtype == torch.float64 else None


def laplacian_pyramid_loss(
    video: Tensor,
    target: Tensor,
    *,
    levels: int = 3,
    blur: str = "binomial",
    sigma: float = 2.0,
    level_weights: Sequence[float] | None = None,
    target_range: tuple[float, float] = (-1.0, 1.0),
    reduction: str = "mean",
    l1_weight: float = 0.0,
    l2_weight: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """Return the L1 loss between Laplacian pyramids; planes are the last two dimensions of any shape [..., H, W].

    Per plane, with G_0 = video - target: band_l = G_l - blur(G_l), G_{l+1} = 2x2 mean of blur(G_l), and the
    loss is sum_l w_l * mean |band_l| + w_L * mean |G_L| over `levels` = L bands and the residual (Ling and
    Okada 2006; as a loss: Bojanowski et al. 2018, whose 2^{2j} weights on sums are these means).

    target         like `video`, or uint8, whose 0..255 is mapped linearly onto `target_range`
    levels         1 to 5; H >> levels and W >> levels must be at least 1
    blur, sigma    "binomial" [1 4 6 4 1]/16; "gaussian", 5 taps of standard deviation `sigma` pixels; "paper",
                   the sum kernel of the GLANN-VIDEO code with its sigma (2.0). Edges are replicated.
    level_weights  levels + 1 numbers, the residual's last; default all 1
    reduction      "none": one value per plane, shape [...]; "mean" or "sum" over planes
    l1_weight      adds l1_weight * mean |video - target| per plane, in the same launch; l2_weight likewise adds
                   l2_weight * mean (video - target)^2

    float32, bfloat16, float16 or float64 video; computed and returned in float32 (float64 for float64).
    Differentiable in `video`, and in a floating-point `target`. `impl`: "auto", "triton" or "reference".
    Raises TypeError on a wrong dtype; ValueError on a wrong shape, mixed devices or an option out of range.
    """
    check_tensor("video", video, FLOATS)
    check_tensor("target", target, (torch.uint8, *FLOATS))
    if video.ndim < 2:
        raise ValueError(f"video: expected at least 2 dimensions, got shape {tuple(video.shape)}")
    check_shape("target", target, tuple(video.shape))
    check_same_device("video", video, "target", target)
    options = Pyramid.checked(
        video.shape[-2:], levels, blur, sigma, level_weights, target_range, reduction, l1_weight, l2_weight
    )
    if switch.chosen("laplacian", impl, video.device, triton_refuses(video)) == "triton":
        if torch.is_grad_enabled() and (video.requires_grad or target.requires_grad):
            return _Loss.apply(video, target, options)
        return _laplacian(video, target, *options.fields(), False)[0]
    return reference.laplacian_pyramid_loss(video, target, options)
