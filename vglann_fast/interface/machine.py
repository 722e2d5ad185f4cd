"""The device and numerics of a call of the Python interface, which leaves the process as it found it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from vglann_kernels import ImplUnavailable, choices, using_impl

from vglann_fast.errors import VglannError
from vglann_fast.run.environment import launched
from vglann_fast.runtime.numerics import numerics


def torch_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device that `--device NAME` means, after trying it; None is "auto".

    Raises `VglannError` for a device that does not exist or cannot be used on this machine.
    """
    wanted = str(name or "auto")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and launched().size > 1:  # one GPU for each process that torchrun starts here
        wanted = f"cuda:{launched().local_rank}"
    try:
        device = torch.device(wanted)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu, cuda or cuda:N")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise VglannError(
            f"--device {wanted}: cannot be used here: {reason}; `vglann doctor` lists what can"
        ) from error
    return device


@contextmanager
def computing(device: torch.device, kernels: str | None) -> Iterator[None]:
    """Compute inside the block as a command with `--device` and `--kernels` does, whatever the caller has set.

    Grad mode, default device and kernels hold for the caller's thread, `numerics` for the process. All of them are
    afterwards as they were. A training sets its own `--precision` inside; everything else computes in float32
    without TensorFloat-32.

    Args:
        device: the device of the block.
        kernels: implementations as for `--kernels`. Default: `VGLANN_KERNELS`, or auto.

    Raises `VglannError` for kernels that do not exist or cannot run on `device`.
    """
    with ExitStack() as block:
        try:
            if kernels is not None:
                block.enter_context(using_impl(kernels))
            choices(device)
        except (ValueError, ImplUnavailable) as error:
            raise VglannError(f"--kernels: {error}" if kernels else str(error)) from error
        block.enter_context(numerics(tf32=False))
        # Also restores gradients that `torch.no_grad` has switched off.
        block.enter_context(torch.inference_mode(False))
        # A device context costs time at every call of PyTorch, so there is one only where the caller has one, too.
        if torch.get_default_device().type != "cpu":
            block.enter_context(torch.device("cpu"))
        yield
