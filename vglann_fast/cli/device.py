"""The device and kernels of a command, from its arguments --device and --kernels."""

from argparse import Namespace
from typing import Any


def device_and_kernels(a: Namespace) -> Any:
    """Return the torch device of --device; --kernels holds until the command ends."""
    from vglann_fast.interface.machine import computing, torch_device

    device = torch_device(a.device)
    a.block.enter_context(computing(device, a.kernels))
    return device
