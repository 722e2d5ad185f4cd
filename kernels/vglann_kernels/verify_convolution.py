"""Compare `upsample_convolution` with float64, for `vglann_kernels.verify`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .batchnorm_relu.op import batch_norm_relu
from .comparison import Line, Shapes, dtypes, gradients_of, leaf, lines, relative_l2
from .product_configurations import LAYERS
from .upsample_conv import reference
from .upsample_conv.op import Statistics, upsample_convolution_statistics

# Some layers of the generator, each of which compiles for seconds: dimensions, channels in and out.
SOME_LAYERS = tuple(
    (len(LAYERS[name][2]), *LAYERS[name][:2])
    for name in ("conv3", "conv4", "head", "background conv4", "background head")
)
# Without a GPU, and where planes are small: one of each kind.
FEW_LAYERS = ((3, 16, 9), (2, 8, 3))
# Relative L2 of values that are rounded to the dtype once.
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}


def upsample_conv(shapes: Shapes) -> Iterator[Line]:
    """`upsample_convolution` at the channels of the generator's layers: output, gradients, statistics.

    The layers with the fewest outputs rectify their input.
    """
    on_gpu = torch.device(shapes.device).type == "cuda"
    for dtype in dtypes(shapes):
        for dims, channels, outputs in SOME_LAYERS if on_gpu and shapes.size > 32 else FEW_LAYERS:
            case = f"{str(dtype).removeprefix('torch.')} {dims}-D {channels} to {outputs}"
            grid, few = (2, 3, 5)[-dims:], outputs < 8
            given, upstream = _layer(shapes, dtype, channels, outputs, grid, rectifying=few)
            y, statistics = yield from compare_layer(case, shapes.impl, given, upstream)
            off = relative_l2(norm(y, statistics), norm(y.double(), None))
            yield Line("upsample_conv", case, "BatchNorm", off, 0.0, ROUNDING[dtype])


def _layer(
    shapes: Shapes, dtype: torch.dtype, channels: int, outputs: int, grid: tuple[int, ...], rectifying: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Return random tensors of a layer, for x [batch, channels, *grid], and a gradient by its output."""
    dims = len(grid)
    form = torch.channels_last if dims == 2 else torch.channels_last_3d
    x = torch.randn(shapes.batch, channels, *grid)
    # Far from where rounding decides the rectification.
    x = x.sign() * (x.abs() + 0.05)
    weight = torch.randn(channels, outputs, *[4] * dims) * (channels * 2**dims) ** -0.5
    upstream = torch.randn(shapes.batch, outputs, *(2 * size for size in grid))
    images = [v.to(shapes.device, dtype).contiguous(memory_format=form) for v in (x, weight, upstream)]
    scale = torch.tensor([0.5, 1.0, 2.0])[torch.randint(3, (channels,))]
    vectors = [v.to(shapes.device) for v in (torch.randn(outputs), scale, torch.zeros(channels))]
    names = ("x", "weight", "bias", "scale", "shift")[: 5 if rectifying else 3]
    return dict(zip(names, [*images[:2], *vectors], strict=False)), images[2]


def compare_layer(
    case: str, impl: str, given: Mapping[str, Tensor], upstream: Tensor,
    convolve: Callable[..., tuple[Tensor, Statistics]] = upsample_convolution_statistics, extra: float = 0.0,
) -> Generator[Line, None, tuple[Tensor, Statistics]]:  # fmt: skip
    """Compare output, gradients and statistics of a layer with float64; returns its output and its statistics.

    given: tensors by the names that `upsample_convolution_statistics` has for them. upstream: gradient by the output.
    convolve: computes by `impl` and by the reference, such as the op under autocast. Default: the op.
    extra: see `lines`.
    """
    left: list[tuple[Tensor, Statistics]] = []

    def run(impl: str, exact: Any) -> list[Tensor]:
        leaves = {name: leaf(value, exact) for name, value in given.items()}
        compute = upsample_convolution_statistics if exact else convolve
        y, statistics = compute(**leaves, impl=impl)
        y.backward(upstream.to(y.dtype))
        left.append((y.detach(), statistics))
        return [y, *gradients_of(*leaves.values())]

    names = " ".join(["y", *(f"grad_{name}" for name in given)])
    yield from lines("upsample_conv", case, names, impl, run, extra=extra)
    # Of the last run, which was of the implementation that is compared.
    y, statistics = left[-1]
    exact_mean, exact_m2 = reference.statistics(y.double())[0]
    mean, m2 = joined_statistics(y, *statistics)
    deviation = (exact_m2 / (y.numel() // y.shape[1])).sqrt()
    for quantity, off, limit in (
        ("mean", ((mean - exact_mean).abs() / deviation).max().item(), 1e-5),
        ("M2", relative_l2(m2, exact_m2), 2e-6),
    ):
        yield Line("upsample_conv", case, quantity, off, 0.0, limit + extra)
    return y, statistics


def norm(y: Tensor, statistics: Any) -> Tensor:
    """Return the BatchNorm and ReLU of y [N,C,...] by statistics that were handed over, or by its own."""
    one = y.new_ones(y.shape[1], dtype=torch.float64 if y.dtype == torch.float64 else torch.float32)
    return batch_norm_relu(y, one, torch.zeros_like(one), statistics=statistics)


def joined_statistics(y: Tensor, parts: Tensor, rows: int) -> Tensor:
    """Return [2,C], mean and M2 of all rows of y, in float64 from the statistics of parts of `rows` rows."""
    mean, m2 = parts.double().unbind(dim=1)
    first = rows * torch.arange(len(parts), device=y.device)
    count = (y.numel() // y.shape[1] - first).clamp(0, rows)[:, None]
    total = (count * mean).sum(dim=0) / count.sum()
    return torch.stack([total, (m2 + count * (mean - total).square()).sum(dim=0)])
