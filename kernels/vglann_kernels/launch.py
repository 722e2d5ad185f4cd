"""Common needs of all launches: can Triton run at all, the right device, and the memory layouts."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

MINIMUM_CAPABILITY = (8, 0)


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
        return f"there are no kernels for {device.type} tensors"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MINIMUM_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{device} has compute capability {major}.{minor}, under 8.0"
    return _import_error()


def device_guard(value: Tensor) -> AbstractContextManager:
    """Make the tensor's device current: Triton launches on the current device, wherever its arguments lie."""
    return torch.cuda.device(value.device) if value.is_cuda else nullcontext()


def is_channels_last(x: Tensor) -> bool:
    """Return True if a 4-D or 5-D tensor is channels-last (and not also contiguous)."""
    form = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=form) and not x.is_contiguous()


def dense(x: Tensor) -> Tensor:
    """Return `x` itself when it is contiguous or channels-last, else a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def laid_out_as(x: Tensor, channels: int) -> Tensor:
    """Return an uninitialized tensor like `x` with `channels` channels: channels-last if `x` is, else contiguous."""
    form = torch.contiguous_format
    if is_channels_last(x):
        form = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)


def refuse_second_derivative(name: str) -> Callable[..., Any]:
    """Return an autograd formula that raises, for a backward op, instead of returning a wrong zero."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name}: the Triton kernel has no second derivative; use impl='reference' for create_graph=True"
        )

    return backward
