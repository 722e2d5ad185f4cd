"""Transposed convolutions of a generator, each checked and timed by itself.

A layer is timed as a step of the training computes it: forward pass and both gradients, for the videos of a step, on
its own grid, in the precision and memory format of the training. An implementation is compared with float64 on the
same grid first, by the limits of `vglann verify`.

Two things are not in these times: BatchNorms read their input once less where a kernel hands them the statistics, and
in a CUDA graph launches cost less. Whole steps have both, and so has the contest of all choices together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from vglann_kernels import upsample_convolution
from vglann_kernels.comparison import Shapes
from vglann_kernels.launch import channels_last_of
from vglann_kernels.upsample_conv.op import layer_of
from vglann_kernels.verify_convolution import layer as compared

from vglann_fast.diagnostics.contest import Lap, Refused
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.measured import as_chosen
from vglann_fast.glo.precision import AUTOCAST, in_precision, resolve_precision, training_numerics
from vglann_fast.options.choices import Choices, settled
from vglann_fast.options.training import TrainOptions
from vglann_fast.runtime.numerics import numerics, seeded

CONVOLUTION = "upsample_conv"
# Videos of the comparison with float64, which takes many times the memory.
MOST_COMPARED = 16


@dataclass(frozen=True)
class Layer:
    """Convolve x [videos, channels, *grid] to [videos, outputs, *(2 * grid)]."""

    channels: int
    outputs: int
    grid: tuple[int, ...]
    bias: bool


def layers_of(generator: TwoStreamGenerator) -> dict[str, Layer]:
    """Return the transposed convolutions of a generator by the names of their choices."""
    grid = generator.grid
    streams = [*_layers(generator.video, grid), *_layers(generator.background, grid[1:])]
    return dict(streams)


def _layers(stream: nn.Module, grid: tuple[int, ...]) -> Iterator[tuple[str, Layer]]:
    for module in stream.modules():
        if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
            sizes = (module.in_channels, module.out_channels)
            yield f"{CONVOLUTION} {layer_of(module.weight)}", Layer(*sizes, grid, module.bias is not None)
            # The next layer reads what this one doubles.
            grid = tuple(2 * size for size in grid)


def prepare_layer(
    layer: Layer, impl: str, videos: int, options: TrainOptions, choices: Choices, device: torch.device
) -> Lap:
    """Check an implementation of a layer and return convolutions by it, each with its gradients.

    options, choices: of the training. Raises `Refused` with the first quantity that is off.
    """
    options = settled(options, choices)
    precision = resolve_precision(options.precision, device)
    dtype = AUTOCAST.get(precision, torch.float32)
    with numerics(tf32=False), seeded(0):
        shapes = Shapes(batch=min(MOST_COMPARED, videos), device=str(device), impl=impl)
        for line in compared(shapes, "", dtype, layer.channels, layer.outputs, layer.grid):
            if not line.ok:
                raise Refused(f"{line.quantity}: {line.error:.2g} off float64 (at most {line.limit:.2g})")
    with as_chosen(choices), training_numerics(options, device):
        # Weights stay float32 under autocast, and what a layer reads has the dtype of the layer before.
        x = torch.randn(videos, layer.channels, *layer.grid, device=device).to(dtype)
        weight = torch.randn(layer.channels, layer.outputs, *[4] * len(layer.grid), device=device)
        bias = torch.randn(layer.outputs, device=device) if layer.bias else None
        if choices.get("memory_format") != "contiguous":
            x, weight = (tensor.contiguous(memory_format=channels_last_of(x)) for tensor in (x, weight))
        leaves = [leaf.requires_grad_() for leaf in (x, weight, bias) if leaf is not None]
        convolve = in_precision(lambda x: upsample_convolution(x, weight, bias, impl=impl), precision, device)
        upstream = torch.randn_like(convolve(x).detach())

    def lap(count: int) -> None:
        with as_chosen(choices), training_numerics(options, device):
            for _ in range(count):
                torch.autograd.grad(convolve(x), leaves, upstream)

    # What is compiled, is compiled here.
    lap(1)
    return lap
