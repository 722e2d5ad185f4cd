"""`mask_composite`: mix a foreground and a still background by a mask, activations included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import impl as switch
from ..checks import FLOATS, check_same_device, check_shape, check_tensor
from ..launch import laid_out_as, operator, why_no_triton, without_second_derivative
from . import reference

switch.register("composite", "reference")
switch.register("composite", "triton", why_no_triton)


def _launch(head: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    from .kernel import composite_fwd

    return composite_fwd(head, background)


def _fake(head: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, *planes = head.shape
    return head.new_empty(batch, 3, *planes), head.new_empty(batch, dtype=torch.float32)


def _launch_backward(
    head: Tensor, background: Tensor, grad_video: Tensor | None, grad_mask_mean: Tensor | None
) -> tuple[Tensor, Tensor]:
    from .kernel import composite_bwd

    return composite_bwd(head, background, grad_video, grad_mask_mean)


def _fake_backward(head: Tensor, background: Tensor, *upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    return laid_out_as(head, 4), laid_out_as(background, 3)


_composite = operator("mask_composite(Tensor head, Tensor background) -> (Tensor, Tensor)", _launch, _fake)
_composite_backward = operator(
    "mask_composite_backward(Tensor head, Tensor background, Tensor? grad_video, Tensor? grad_mask_mean)"
    " -> (Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


class _Composite(torch.autograd.Function):
    """The composite; its backward pass computes the activations again from the inputs."""

    @staticmethod
    def forward(ctx: Any, head: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(head, background)
        # An output nobody uses has gradient None, not a tensor of zeros. torch.compile knows no such setting.
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        return _composite(head, background)

    @staticmethod
    def backward(ctx: Any, grad_video: Tensor | None, grad_mask_mean: Tensor | None) -> tuple[Tensor, ...]:
        gradients = _composite_backward(*ctx.saved_tensors, grad_video, grad_mask_mean)
        return without_second_derivative("mask_composite", gradients)


def mask_composite(head: Tensor, background: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Return (video [B,3,T,H,W], mask_mean [B]) of head [B,4,T,H,W] and background [B,3,H,W], all logits.

    video = m * f + (1 - m) * b, in [-1, 1], with f = tanh of channels 0-2 of `head`, m = sigmoid of channel 3
    and b = tanh of `background`, the same for all frames. mask_mean is the mean of m over a video (the
    mask's sparsity prior is a multiple of it). Differentiable in both inputs through both outputs, once:
    with "triton" a second derivative raises RuntimeError.

    float32, bfloat16, float16 or float64, the same for both; computed in float32 (float64 for float64, which
    only the reference takes). The video has the dtype of `head` and, with "triton", is contiguous; mask_mean
    is float32 (float64 for float64). Contiguous and channels-last inputs are read as they lie, others are copied.
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
        if torch.is_grad_enabled() and (head.requires_grad or background.requires_grad):
            return _Composite.apply(head, background)
        return _composite(head, background)
    return reference.mask_composite(head, background)
