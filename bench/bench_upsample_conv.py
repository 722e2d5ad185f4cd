"""`upsample_convolution` on the narrow layers of both streams: the framework's convolution and Triton, channels-last.

Width 64, on a CPU an eighth of it; the wide layers are in `bench_conv_layers`, by the framework alone.
"""

import math

import pytest
import torch
from vglann_kernels import upsample_convolution

from vglann_fast.experiments.convolutions import LAYERS, channels_of
from vglann_fast.experiments.timing import DEVICE, DTYPE, MODES, SHAPES, Group, in_mode

NARROW = ("conv4", "head", "background conv4", "background head")


def group(batch: int, layer: str, mode: str) -> Group:
    """The contenders on a layer for `batch` videos; the heads have a bias."""
    (channels, out), grid = channels_of(layer), LAYERS[layer][2]
    n = len(grid)
    form = torch.channels_last if n == 2 else torch.channels_last_3d
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE).to(DTYPE).contiguous(memory_format=form)

    x, upstream = random(batch, channels, *grid), random(batch, out, *(2 * size for size in grid))
    weight = random(channels, out, *[4] * n)
    inputs = [x, weight, *([torch.randn(out, device=DEVICE)] if "head" in layer else [])]
    inputs = [value.requires_grad_(mode != "fwd") for value in inputs]
    calls = {
        impl: in_mode(mode, lambda impl=impl: upsample_convolution(*inputs, impl=impl), inputs, upstream)
        for impl in ("reference", "triton")
    }
    # Each of the three products reads two of x, weights and y and writes the third.
    passes = {"fwd": 1, "bwd": 2, "full": 3}[mode]
    moved = (x.numel() + weight.numel() + upstream.numel()) * x.element_size()
    flops = 2 * batch * math.prod(grid) * weight.numel()
    return Group(calls, 2e-2, passes * moved, passes * flops)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layer", NARROW)
@pytest.mark.parametrize("mode", MODES)
def test_upsample_conv(benchmark, timing, shape, layer, mode):
    timing.record(benchmark, group(shape[0], layer, mode))
