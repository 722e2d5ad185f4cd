"""BatchNorm and ReLU of the video stream: the 3-D one, the 2-D one on time and rows joined, compiled; width 64.

Half-precision inputs with float32 parameters, as autocast leaves them. "reference" is the 3-D one.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vglann_fast.experiments.timing import DEVICE, DTYPE, LAYOUTS, SHAPES, Group, compiled, in_mode

# channels and grid of a video of 32 x 64 x 64
NORMS = {
    "norm1": (512, (2, 4, 4)),
    "norm2": (256, (4, 8, 8)),
    "norm3": (128, (8, 16, 16)),
    "norm4": (64, (16, 32, 32)),
}


def contenders(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Each normalizes x [B,C,T,H,W] by its own statistics in train mode, keeps them, and applies ReLU."""
    kept = [torch.zeros_like(weight.detach()), torch.ones_like(weight.detach())]

    def normalized(values: Tensor) -> Tensor:
        return F.relu(F.batch_norm(values, *kept, weight, bias, training=True), inplace=True)

    return {
        "reference": lambda: normalized(x),
        "flatten": lambda: normalized(x.flatten(2, 3)).unflatten(2, x.shape[2:4]),
        "compile": compiled(lambda: normalized(x)),
        "flatten, compile": compiled(lambda: normalized(x.flatten(2, 3)).unflatten(2, x.shape[2:4])),
    }


def group(shape: tuple[int, int, int], norm: str, layout: str, mode: str) -> Group:
    """The contenders on the input of a layer, for `shape` (videos, frames, size)."""
    channels, grid = NORMS[norm]
    torch.manual_seed(0)
    form = torch.channels_last_3d if LAYOUTS[layout] else torch.contiguous_format
    x = torch.randn(shape[0], channels, *grid, device=DEVICE).to(DTYPE).contiguous(memory_format=form)
    weight, bias = torch.rand(channels, device=DEVICE) + 0.5, torch.randn(channels, device=DEVICE)
    upstream = torch.randn_like(x)
    inputs = [value.requires_grad_(mode != "fwd") for value in (x, weight, bias)]
    calls = {name: in_mode(mode, call, inputs, upstream) for name, call in contenders(*inputs).items()}
    passes = 2 if mode == "fwd" else 5  # in, out; and for the gradient in, upstream, out
    return Group(calls, 2e-2, passes * x.numel() * x.element_size())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["fwd", "full"])
def test_batchnorm(benchmark, timing, shape, norm, layout, mode):
    timing.record(benchmark, group(shape, norm, layout, mode))
