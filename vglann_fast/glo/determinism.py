"""The same bytes twice on one machine, where arithmetic in another order would give other last digits.

Our own kernels sum in a fixed order. Of PyTorch's operations those are taken that do, too, at some cost in time;
there is no measuring of which algorithm is fastest, for the winner may change. One device and one number of threads:
another GPU, another number of CPU threads or another version of PyTorch may still round differently.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vglann_fast.errors import VglannError


def set_deterministic(on: bool) -> None:
    """Whether everything in this process, from here on, computes the same bits from the same bits."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = False


@contextmanager
def deterministic_or_named() -> Iterator[None]:
    """Turn PyTorch's refusal of an operation, which has no deterministic version, into a `VglannError`."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        if "deterministic" not in reason:
            raise
        raise VglannError(f"--deterministic: {reason.split('. ')[0]}; leave it out on this device") from error
