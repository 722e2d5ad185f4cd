"""Transposed convolutions of a generator, each checked and timed by itself.

A layer is timed as a step of the training computes it: forward pass and both gradients, for the videos of a step, on
its own grid, in the precision and memory format of the training. The same is compared with float64 first, by limits
that grow with the number of values in a sum.

Two things are not in these times: BatchNorms read their input once less where a kernel hands them the statistics, and
in a CUDA graph launches cost less. Whole steps have both, and so has the contest of all choices together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vglann_kernels import upsample_convolution, upsample_convolution_statistics
from vglann_kernels.comparison import error_of_sums
from vglann_kernels.upsample_conv.op import layer_name
from vglann_kernels.verify_convolution import compare_layer

from vglann_fast.diagnostics.contest import Lap, Refused
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.measured import as_chosen
from vglann_fast.glo.precision import AUTOCAST, in_precision, resolve_precision, training_numerics
from vglann_fast.options.choices import Choices, settled
from vglann_fast.options.training import TrainOptions
from vglann_fast.runtime.numerics import seeded

CONVOLUTION = "upsample_conv"
# Videos of the comparison with float64, which takes many times the memory.
MOST_COMPARED = 16
# Of products in TensorFloat-32, which keeps 10 bits of both factors.
ROUNDING_OF_TF32 = 2.0**-9


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
            yield f"{CONVOLUTION} {layer_name(module.weight)}", Layer(*sizes, grid, module.bias is not None)
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
    form = torch.contiguous_format
    if choices.get("memory_format") != "contiguous":
        form = torch.channels_last if len(layer.grid) == 2 else torch.channels_last_3d

    def in_form(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).contiguous(memory_format=form)

    def convolved(op: Any, *, impl: str, **leaves: Tensor) -> Any:
        return in_precision(lambda x: op(**{**leaves, "x": x}, impl=impl), precision, device)(leaves["x"])

    with as_chosen(choices), training_numerics(options, device), seeded(0):
        given = {
            # What a layer reads has the dtype of the layer before, and weights stay float32 under autocast.
            "x": in_form(videos, layer.channels, *layer.grid).to(dtype),
            "weight": in_form(layer.channels, layer.outputs, *[4] * len(layer.grid)),
        }
        if layer.bias:
            given["bias"] = torch.randn(layer.outputs, device=device)
        upstream = in_form(videos, layer.outputs, *(2 * size for size in layer.grid)).to(dtype)
        few, gradient = {**given, "x": given["x"][:MOST_COMPARED]}, upstream[:MOST_COMPARED]
        extra = error_of_sums(gradient[:, 0].numel()) + (ROUNDING_OF_TF32 if precision == "tf32" else 0.0)
        convolve = partial(convolved, upsample_convolution_statistics)
        compared = compare_layer("", impl, few, gradient, convolve, extra)
        off = next((line for line in compared if not line.ok), None)
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}

    def lap(count: int) -> None:
        with as_chosen(choices), training_numerics(options, device):
            for _ in range(count):
                y = convolved(upsample_convolution, impl=impl, **leaves)
                torch.autograd.grad(y, list(leaves.values()), upstream)

    if off is not None:
        raise Refused(f"{off.quantity}: {off.error:.2g} off float64 (at most {off.limit:.2g})", lap)
    # What is compiled, is compiled here.
    lap(1)
    return lap
