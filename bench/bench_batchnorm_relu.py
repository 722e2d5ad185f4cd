"""`batch_norm_relu` in training on the video stream's layers: 2-D as the reference takes them, 3-D, compiled, Triton.

Half-precision inputs with float32 parameters, as autocast leaves them; width 64, on a CPU an eighth of it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vglann_kernels import batch_norm_relu

from vglann_fast.experiments.timing import DEVICE, DTYPE, LAYOUTS, MODES, SHAPES, Group, compiled, in_mode

# channels and grid of a video of 32 x 64 x 64
NORMS = {
    "norm1": (512, (2, 4, 4)),
    "norm2": (256, (4, 8, 8)),
    "norm3": (128, (8, 16, 16)),
    "norm4": (64, (16, 32, 32)),
}


def group(shape: tuple[int, int, int], norm: str, layout: str, mode: str) -> Group:
    """The contenders on the input of a layer, for `shape` (videos, frames, size)."""
    channels, grid = NORMS[norm]
    channels = channels if DEVICE == "cuda" else channels // 8
    torch.manual_seed(0)
    form = torch.channels_last_3d if LAYOUTS[layout] else torch.contiguous_format
    x = torch.randn(shape[0], channels, *grid, device=DEVICE).to(DTYPE).contiguous(memory_format=form)
    weight, bias = torch.rand(channels, device=DEVICE) + 0.5, torch.randn(channels, device=DEVICE)
    upstream = torch.randn_like(x)
    inputs = [value.requires_grad_(mode != "fwd") for value in (x, weight, bias)]
    running = [torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)]
    counter = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def op(impl: str):
        return lambda: batch_norm_relu(*inputs, *running, counter, impl=impl)

    def three_dimensional() -> Tensor:
        return F.relu(F.batch_norm(x, *running, weight, bias, training=True), inplace=True)

    forwards = {"reference": op("reference"), "3-D": three_dimensional, "triton": op("triton")}
    forwards["compile"] = compiled(op("reference"))
    calls = {name: in_mode(mode, forward, inputs, upstream) for name, forward in forwards.items()}
    # x twice and y; x and the gradient twice, and x's gradient.
    passes = {"fwd": 3, "bwd": 5, "full": 8}[mode]
    return Group(calls, 2e-2, passes * x.numel() * x.element_size())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_batchnorm_relu(benchmark, timing, shape, norm, layout, mode):
    timing.record(benchmark, group(shape, norm, layout, mode))
