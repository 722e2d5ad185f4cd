"""Each transposed convolution of the generator by itself: forward, gradient by the input, gradient by the weights.

Contenders are the layouts the library can be given, with its own choice of algorithm and with its search for the best
one; the rows name the kernels that ran. Width 64; the first layers of both streams are one matrix product and the
ceiling beside every group is another.
"""

import math

import pytest
import torch

from vglann_fast.experiments.convolutions import LAYERS, channels_of
from vglann_fast.experiments.timing import DEVICE, DTYPE, SHAPES, Contender, Group

PASSES = {"fwd": None, "dgrad": (True, False, False), "wgrad": (False, True, False)}
CONTENDERS = {  # name -> (channels-last, cuDNN searches)
    "contiguous": (False, False),
    "channels-last": (True, False),
    "contiguous, searched": (False, True),
    "channels-last, searched": (True, True),
}


def one_pass(name: str, batch: int, which: str, channels_last: bool, searched: bool) -> Contender:
    """The pass `which` of layer `name` on `batch` videos, kernel 4, stride 2, padding 1."""
    (channels, out), grid = channels_of(name), LAYERS[name][2]
    n = len(grid)
    form = torch.contiguous_format
    if channels_last:
        form = torch.channels_last_3d if n == 3 else torch.channels_last
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, device=DEVICE, generator=generator)
        return values.to(DTYPE).contiguous(memory_format=form)

    x = random(batch, channels, *grid)
    weight = random(channels, out, *[4] * n)
    upstream = random(batch, out, *(2 * size for size in grid))
    stride, padding, one, zero = [2] * n, [1] * n, [1] * n, [0] * n

    def call() -> torch.Tensor:
        with torch.backends.cudnn.flags(benchmark=searched, allow_tf32=False):
            if which == "fwd":
                return torch.ops.aten.convolution(x, weight, None, stride, padding, one, True, zero, 1)
            found = torch.ops.aten.convolution_backward(
                upstream, x, weight, None, stride, padding, one, True, zero, 1, PASSES[which]
            )
            return next(gradient for gradient in found if gradient is not None)

    return lambda: call


def kernels_of(contender: Contender) -> list[str]:
    """Names of the GPU kernels of one call, the longest-running first; none without a GPU."""
    if DEVICE == "cpu":
        return []
    call = contender()
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    return [event.key[:100] for event in events if event.self_device_time_total > 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("which", PASSES)
def test_convolution(benchmark, timing, shape, layer, which):
    batch = shape[0]
    calls = {name: one_pass(layer, batch, which, *how) for name, how in CONTENDERS.items()}
    (channels, out), positions = channels_of(layer), batch * math.prod(LAYERS[layer][2])
    dimensions = len(LAYERS[layer][2])
    weights = channels * out * 4**dimensions
    moved = (
        positions * channels + weights + positions * 2**dimensions * out
    )  # in every pass two of them in, one out
    group = Group(calls, 2e-2, moved * DTYPE.itemsize, 2 * positions * weights)
    timing.record(benchmark, group, kernels_of)
