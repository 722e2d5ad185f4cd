"""`mask_composite`: mix a foreground and a still background by a mask, activations included."""

from typing import Any

import torch
from torch import Tensor

from .. import impl as switch
from ..checks import FLOATS, check_same_device, check_shape, check_tensor
from ..launch import laid_out_as, refuse_second_derivative, why_no_triton
from . import reference

switch.register("composite", "reference")
switch.register("composite", "triton", why_no_triton)


@torch.library.custom_op("vglann_kernels::mask_composite", mutates_args=())
def _composite(head: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    from .kernel import composite_fwd

    return composite_fwd(head, background)


@torch.library.custom_op("vglann_kernels::mask_composite_backward", mutates_args=())
def _composite_backward(
    head: Tensor, background: Tensor, grad_video: Tensor, grad_mask_mean: Tensor
) -> tuple[Tensor, Tensor]:
    from .kernel import composite_bwd

    return composite_bwd(head, background, grad_video, grad_mask_mean)


@_composite.register_fake
def _(head: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    return laid_out_as(head, 3), head.new_empty(head.shape[0], dtype=torch.float32)


@_composite_backward.register_fake
def _(head: Tensor, background: Tensor, grad_video: Tensor, grad_mask_mean: Tensor) -> tuple[Tensor, Tensor]:
    return laid_out_as(head, 4), laid_out_as(background, 3)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_video: Tensor, grad_mask_mean: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.vglann_kernels.mask_composite_backward(*ctx.saved_tensors, grad_video, grad_mask_mean)


_composite.register_autograd(_backward, setup_context=_save)
_composite_backward.register_autograd(refuse_second_derivative("mask_composite"))


def mask_composite(head: Tensor, background: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """(video [B,3,T,H,W], mask_mean [B]) of head [B,4,T,H,W] and background [B,3,H,W], all logits.

    video = m * f + (1 - m) * b, in [-1, 1], with f = tanh of channels 0-2 of `head`, m = sigmoid of channel 3
    and b = tanh of `background`, the same for all frames. mask_mean is the mean of m over a video (the
    sparsity prior of the mask is a multiple of it). Differentiable in both inputs through both outputs, once:
    with "triton" a second derivative raises RuntimeError.

    float32, bfloat16, float16 or float64, the same for both; computed in float32 (float64 for float64, which
    only the reference takes). The video has the dtype of `head`; mask_mean is float32 (float64 for float64).
    Contiguous and channels-last inputs are read as they lie, others are copied.
    `impl`: "auto", "triton" or "reference"; None takes the process default (see `vglann_kernels.impl`).
    Raises TypeError on a wrong dtype, ValueError on a wrong shape or mixed devices.
    """
    check_tensor("head", head, FLOATS)
    check_tensor("background", background, (head.dtype,))
    check_shape("head", head, ("B", 4, "T", "H", "W"))
    check_shape("background", background, (head.shape[0], 3, *head.shape[3:]))
    check_same_device("head", head, "background", background)
    unsupported = "head: expected a 16- or 32-bit float, got float64" if head.dtype == torch.float64 else None
    if switch.chosen("composite", impl, head.device, unsupported) == "triton":
        return torch.ops.vglann_kernels.mask_composite(head, background)
    return reference.mask_composite(head, background)
