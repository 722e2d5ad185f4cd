"""Common needs of all launches: can Triton run at all, the right device, and the memory layouts."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops

MINIMUM_CAPABILITY = (8, 0)
# Options of every launch. Triton's own default for fused multiply-adds differs between its versions.
LAUNCH = {"enable_fp_fusion": True}

_library = torch.library.Library(ops.name, "FRAGMENT")


def interpreted() -> bool:
    """Return True if Triton was told to interpret its kernels on the CPU (`TRITON_INTERPRET=1`, read at import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _import_error() -> str | None:
    try:
        import_module("triton.language")
    # A broken install raises anything: a missing library, a wrong LLVM.
    except Exception as error:
        return f"triton does not import ({type(error).__name__}: {error}); pip install 'triton>=3.6'"
    return None


def why_no_triton(device: torch.device) -> str | None:
    """Return None when Triton kernels can run for tensors on `device`, else the reason in one line."""
    if device.type == "cpu" and not interpreted():
        return "it needs a GPU (for tests its interpreter takes CPU tensors, with TRITON_INTERPRET=1)"
    if device.type not in ("cpu", "cuda"):
        return f"no kernel takes {device.type} tensors"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MINIMUM_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{device} has compute capability {major}.{minor}, under 8.0"
    return _import_error()


def device_guard(value: Tensor) -> AbstractContextManager:
    """Make the tensor's device current: Triton launches on the current device, wherever its arguments lie."""
    return torch.cuda.device(value.device) if value.is_cuda else nullcontext()


def channels_last_of(x: Tensor) -> torch.memory_format:
    """Return the channels-last format of images [N,C,H,W] or of videos [N,C,T,H,W]."""
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def is_channels_last(x: Tensor) -> bool:
    """Return True if a 4-D or 5-D tensor is channels-last (and not also contiguous)."""
    return x.is_contiguous(memory_format=channels_last_of(x)) and not x.is_contiguous()


def dense(x: Tensor) -> Tensor:
    """Return `x` itself when it is contiguous or channels-last, else a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def laid_out_as(x: Tensor, channels: int) -> Tensor:
    """Return an uninitialized tensor like `x` with `channels` channels: channels-last if `x` is, else contiguous."""
    form = channels_last_of(x) if is_channels_last(x) else torch.contiguous_format
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)


def is_traced(tensor: Tensor) -> bool:
    """Return True if a graph is being traced: by torch.compile, or with stand-ins in place of tensors."""
    return torch.compiler.is_compiling() or type(tensor) is not Tensor


@cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; a small number for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def operator(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `launch` as an operator of this package for all devices and return the operator.

    `fake` gives its outputs for tensors without data. The operator has no autograd formula: an autograd.Function
    calls it. `torch.library.custom_op` would add bookkeeping in Python to every call, several times the cost of a
    launch.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _library.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=_library)
    return getattr(ops, name).default


class _NoSecondDerivative(torch.autograd.Function):
    """Identity whose derivative raises."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, name: str, *gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(gradient.clone() for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.name}: the Triton kernel has no second derivative; "
            "use impl='reference' for create_graph=True"
        )


def without_second_derivative(name: str, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the gradients so that, with create_graph=True, deriving them raises instead of giving a wrong zero."""
    if is_traced(gradients[0]) or not torch.is_grad_enabled():
        return gradients
    anchor = torch.empty((), requires_grad=True)
    return _NoSecondDerivative.apply(anchor, name, *gradients)
