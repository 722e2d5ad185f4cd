"""`laplacian_pyramid_loss`: L1 between the Laplacian pyramids of two videos, plane by plane."""

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from .. import impl as switch
from ..checks import FLOATS, check_same_device, check_shape, check_tensor
from ..launch import refuse_second_derivative, why_no_triton
from . import reference
from .pyramid import Pyramid

TRITON_SIZES = (32, 64, 128)

switch.register("laplacian", "reference")
switch.register("laplacian", "triton", why_no_triton)


@torch.library.custom_op("vglann_kernels::laplacian_pyramid", mutates_args=())
def _laplacian(
    video: Tensor,
    target: Tensor,
    levels: int,
    blur: str,
    sigma: float,
    level_weights: Sequence[float],
    target_range: Sequence[float],
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, its gradient by `video` up to a factor for float16; empty unless `with_gradient`)."""
    from . import kernel

    low, high = target_range
    options = Pyramid(levels, blur, sigma, tuple(level_weights), (low, high), reduction)
    unit = 1.0 if video.dtype == torch.float16 else kernel.gradient_unit(video, options.weights, reduction)
    losses, gradient = kernel.laplacian_fwd(video, target, options, unit, with_gradient)
    return options.reduced(losses), gradient


@torch.library.custom_op("vglann_kernels::scale_gradient", mutates_args={"gradient"})
def _scale_gradient(gradient: Tensor, upstream: Tensor, factor: float) -> None:
    from . import kernel

    kernel.scale_gradient(gradient, gradient, upstream, factor)


@torch.library.custom_op("vglann_kernels::scaled_gradient", mutates_args=())
def _scaled_gradient(gradient: Tensor, upstream: Tensor, factor: float) -> Tensor:
    from . import kernel

    out = torch.empty_like(gradient)
    kernel.scale_gradient(gradient, out, upstream, factor)
    return out


@_scaled_gradient.register_fake
def _(gradient: Tensor, upstream: Tensor, factor: float) -> Tensor:
    return torch.empty_like(gradient)


_scaled_gradient.register_autograd(refuse_second_derivative("laplacian_pyramid_loss"))


def saved_times_upstream(ctx: Any, upstream: Tensor, factor: float) -> tuple[Tensor, ...]:
    """The saved gradients * upstream * factor, in a backward pass whose gradients were made in the forward.

    In an eager backward the saved tensors themselves are scaled, which costs nothing where the product is 1;
    so they can be handed out once. While a graph is traced, and with create_graph=True, new ones are made.
    """
    if getattr(ctx, "handed_out", False):
        raise RuntimeError(
            "the Triton loss made its gradient in the forward and hands it out once; "
            "call the loss again instead of using retain_graph=True, or use impl='reference'"
        )
    gradients = ctx.saved_tensors
    if type(gradients[0]) is not Tensor or torch.is_grad_enabled():
        scaled = torch.ops.vglann_kernels.scaled_gradient
        return tuple(scaled(gradient, upstream, factor) for gradient in gradients)
    ctx.handed_out = True
    for gradient in gradients:
        torch.ops.vglann_kernels.scale_gradient(gradient, upstream, factor)
    return gradients


@_laplacian.register_fake
def _(video: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, with_gradient = options
    gradient = torch.empty_like(video) if with_gradient else video.new_empty(0)
    return video.new_empty(video.shape[:-2] if reduction == "none" else (), dtype=torch.float32), gradient


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    video, target, _, _, _, weights, _, reduction, _ = inputs
    ctx.save_for_backward(output[1])
    ctx.target_dtype = target.dtype
    ctx.factor = 1.0
    if video.dtype == torch.float16:  # its gradient was left in large units, which float16 can hold
        from . import kernel

        ctx.factor = kernel.gradient_unit(video, tuple(weights), reduction)


def _backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = saved_times_upstream(ctx, grad_loss, ctx.factor)
    by_video = gradient if ctx.needs_input_grad[0] else None
    by_target = -gradient.to(ctx.target_dtype) if ctx.needs_input_grad[1] else None
    return by_video, by_target, *[None] * 7


_laplacian.register_autograd(_backward, setup_context=_save)


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
    options = Pyramid.checked(video.shape[-2:], levels, blur, sigma, level_weights, target_range, reduction)
    if switch.chosen("laplacian", impl, video.device, triton_refuses(video)) == "triton":
        with_gradient = torch.is_grad_enabled() and (video.requires_grad or target.requires_grad)
        return torch.ops.vglann_kernels.laplacian_pyramid(video, target, *astuple(options), with_gradient)[0]
    return reference.laplacian_pyramid_loss(video, target, options)
