"""What a command computes on, from its arguments: --device, --kernels and --deterministic."""

from typing import Any

from jsonargparse import Namespace

from vglann_fast.errors import VglannError
from vglann_fast.run.environment import launched


def device_and_kernels(a: Namespace) -> Any:
    """Return the torch device of --device; --kernels holds for the process from here on."""
    from vglann_kernels import ImplUnavailable, choices, use_impl

    device = device_of(a)
    try:
        if a.kernels is not None:
            use_impl(a.kernels)
        choices(device)  # also what VGLANN_KERNELS says, before anything is written
    except (ValueError, ImplUnavailable) as error:
        raise VglannError(f"--kernels: {error}" if a.kernels else str(error)) from error
    return device


def device_of(a: Namespace) -> Any:
    """The torch device of --device, tried."""
    import torch

    name = a.device if a.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and launched().size > 1:  # one GPU for each process that torchrun starts here
        name = f"cuda:{launched().local_rank}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu, cuda or cuda:N")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise VglannError(
            f"--device {name}: cannot be used here: {str(error).splitlines()[0]}; `vglann doctor` says what can"
        ) from error
    return device
