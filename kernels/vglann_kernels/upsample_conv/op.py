"""`upsample_convolution`: the transposed convolution that doubles images and videos."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import impl as switch
from ..batchnorm_relu import op as batchnorm_relu
from ..checks import FLOATS, check_same_device, check_shape, check_tensor, compute_dtype
from ..launch import channels_last_of, operator, why_no_triton, without_second_derivative
from . import reference

switch.register("upsample_conv", "reference")
switch.register("upsample_conv", "triton", why_no_triton)

# Positions and weights are counted in 32 bits, with room for a tile behind the last one.
MAX_COUNT = 2**31 - 1024


class Statistics(NamedTuple):
    """Statistics of y by channel: parts [P,2,C], mean and M2 of each part of its rows.

    Each part has `rows` rows until all are dealt out; the next one has the rest, and those after it are empty. M2 is
    the sum of squared differences from the mean. A row is a position of y.
    """

    parts: Tensor
    rows: int


def _launch_forward(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from . import kernel

    return kernel.forward(x, weight, *rest)


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    from . import kernel

    shape = kernel.output_shape(x, weight)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=channels_last_of(x))
    parts = kernel.PARTS if statistics else 0
    return y, x.new_empty(parts, 2, weight.shape[1], dtype=torch.float32)


def _launch_input_gradient(grad: Tensor, weight: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from . import kernel

    return kernel.input_gradient(grad, weight, x, *rest)


def _fake_input_gradient(
    grad: Tensor, weight: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    from . import kernel

    parts = kernel.tiles_of(x) if scale is not None else 0
    return torch.empty_like(x), x.new_empty(parts, 2, weight.shape[0], dtype=torch.float32)


def _launch_weight_gradient(grad: Tensor, weight: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from . import weight_gradient

    return weight_gradient.weight_gradient(grad, weight, x, *rest)


def _fake_weight_gradient(
    grad: Tensor, weight: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, with_sums: bool
) -> tuple[Tensor, Tensor]:
    places = weight[0, 0].numel() if with_sums else 0
    return torch.empty_like(weight), x.new_empty(places, weight.shape[1], dtype=torch.float32)


_forward = operator(
    "upsample_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, bool statistics)"
    " -> (Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_SAVED = "Tensor grad, Tensor weight, Tensor x, Tensor? scale, Tensor? shift"
_input_gradient = operator(
    f"upsample_conv_input_gradient({_SAVED}) -> (Tensor, Tensor)",
    _launch_input_gradient,
    _fake_input_gradient,
)
_weight_gradient = operator(
    f"upsample_conv_weight_gradient({_SAVED}, bool with_sums) -> (Tensor, Tensor)",
    _launch_weight_gradient,
    _fake_weight_gradient,
)


class _UpsampleConv(torch.autograd.Function):
    """The convolution; it saves its input, and rectifies it again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
        statistics: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, parts = _forward(x, weight, bias, scale, shift, statistics)
        ctx.save_for_backward(x, weight, scale, shift)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(parts)
        # torch.compile knows no such setting.
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        return y, parts

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        x, weight, scale, shift = ctx.saved_tensors
        grad = grad.contiguous(memory_format=channels_last_of(x))
        by_x, by_weight, by_bias, by_scale, by_shift, _ = ctx.needs_input_grad
        gradients: list[Tensor | None] = [None] * 5
        if by_x or by_scale or by_shift:
            gradients[0], parts = _input_gradient(grad, weight, x, scale, shift)
            if scale is not None:
                sums = parts.sum(dim=0)  # [2,C]
                gradients[3], gradients[4] = sums[0].to(scale.dtype), sums[1].to(shift.dtype)
        if by_weight or by_bias:
            gradients[1], sums = _weight_gradient(grad, weight, x, scale, shift, by_bias)
            if by_bias:
                places = sums.unflatten(0, weight.shape[2:])
                # Each output is met once by the places 1 and 2 of each dimension.
                dims = tuple(range(x.ndim - 2))
                gradients[2] = places[(slice(1, 3),) * len(dims)].sum(dim=dims).to(ctx.bias_dtype)
        wanted = [g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False)]
        present = without_second_derivative("upsample_convolution", tuple(g for g in wanted if g is not None))
        left = iter(present)
        return (*(None if g is None else next(left) for g in wanted), None)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, cast: bool
) -> None:
    check_tensor("x", x, FLOATS)
    if x.ndim not in (4, 5):
        raise ValueError(f"x: expected shape (N, C, H, W) or (N, C, T, H, W), got {tuple(x.shape)}")
    floats = FLOATS if cast else tuple(dict.fromkeys((x.dtype, compute_dtype(x))))
    check_tensor("weight", weight, floats)
    check_shape("weight", weight, (x.shape[1], "outputs", *[4] * (x.ndim - 2)))
    if (scale is None) != (shift is None):
        missing = "scale" if scale is None else "shift"
        raise ValueError(f"{missing}: expected both scale and shift, or neither, got None")
    vectors = {"bias": (bias, weight.shape[1]), "scale": (scale, x.shape[1]), "shift": (shift, x.shape[1])}
    for name, (vector, size) in vectors.items():
        if vector is not None:
            check_tensor(name, vector, floats)
            check_shape(name, vector, (size,))
            check_same_device("x", x, name, vector)
    check_same_device("x", x, "weight", weight)


def _unsupported(x: Tensor, weight: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "x: expected a 16- or 32-bit float, got float64"
    if not x.is_contiguous(memory_format=channels_last_of(x)):
        return f"x: expected a channels-last tensor, got strides {x.stride()}"
    if x.numel() // max(1, x.shape[1]) > MAX_COUNT:
        return f"x: expected at most {MAX_COUNT} positions, got shape {tuple(x.shape)}"
    if weight.numel() > MAX_COUNT:
        return f"weight: expected at most {MAX_COUNT} values, got shape {tuple(weight.shape)}"
    return None


def layer_name(weight: Tensor) -> str:
    """Return the name of a layer in the switch: "3d 128-64" convolves videos from 128 channels to 64."""
    return f"{weight.ndim - 2}d {weight.shape[0]}-{weight.shape[1]}"


def _implementation(x: Tensor, weight: Tensor, impl: str | None) -> str:
    """Return the name of the implementation that convolves; without values that is the reference."""
    name = switch.chosen("upsample_conv", impl, x.device, _unsupported(x, weight), layer_name(weight))
    return name if x.numel() > 0 and weight.numel() > 0 else "reference"


def statistics_pay(x: Tensor, weight: Tensor) -> bool:
    """Return True if a BatchNorm that follows should get the convolution's statistics.

    That is where both are Triton's, and the norm would read its input twice.
    """
    rows = x.numel() // max(1, x.shape[1]) * 2 ** (x.ndim - 2)
    if rows <= batchnorm_relu.FEW_ROWS or _implementation(x, weight, None) != "triton":
        return False
    return switch.chosen("batchnorm_relu", None, x.device) == "triton"


def upsample_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Return the transposed convolution (kernel 4, stride 2, padding 1) of x [N,C,H,W] or [N,C,T,H,W].

    weight [C,O,4,4] or [C,O,4,4,4], bias [O]; y has O channels, twice the size in every direction, and the dtype of
    x. With scale and shift [C], what is convolved is max(0, scale x + shift): a BatchNorm and its ReLU.

    x float32, bfloat16, float16 or float64; the others of the same dtype or float32 (float64 for float64), which
    rounds weights to the dtype of x. Products are summed in float32. Autocast casts as for PyTorch's convolution.
    Differentiable in all tensors, once with Triton: a second derivative raises RuntimeError. The Triton kernels take
    a channels-last x and give a channels-last y; weights in another layout are copied.
    `impl`: "reference", the framework's convolution; "triton"; "auto", the reference, unless another one is preferred
    for this layer. None takes the process default (see `vglann_kernels.impl`).
    Raises TypeError on a wrong dtype, ValueError on a wrong shape, mixed devices, scale without shift, and, where
    Triton is asked for by name, a float64 x or one that is not channels-last.
    """
    return _convolved(x, weight, bias, scale, shift, False, impl)[0]


def upsample_convolution_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Statistics]:
    """Return `upsample_convolution(...)` and the statistics of each of its channels, for the BatchNorm that follows.

    The statistics have no gradient. float32 (float64 for float64); the Triton kernel takes them from its registers.
    """
    return _convolved(x, weight, bias, scale, shift, True, impl)


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    statistics: bool, impl: str | None,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    _check(x, weight, bias, scale, shift, isinstance(x, Tensor) and _is_cast(x))
    compute = IMPLEMENTATIONS[_implementation(x, weight, impl)]
    return compute(x, weight, bias, scale, shift, statistics)


def _is_cast(x: Tensor) -> bool:
    """Return True if autocast casts tensors on the device of x."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def _by_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    y = reference.upsample_conv(x, weight, bias, scale, shift)
    parts = reference.statistics(y) if statistics else y.new_empty(0)
    return y, Statistics(parts, y.numel() // max(1, y.shape[1]))


def _by_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    if _is_cast(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weight = weight.to(x.dtype).contiguous(memory_format=channels_last_of(x))
    vectors = [None if vector is None else vector.contiguous() for vector in (bias, scale, shift)]
    tensors = [x, weight, *vectors]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, parts = _UpsampleConv.apply(x, weight, *vectors, statistics)
    else:
        y, parts = _forward(x, weight, *vectors, statistics)
    return y, Statistics(parts, _rows_of_a_part(x) if statistics else 0)


def _rows_of_a_part(x: Tensor) -> int:
    from . import kernel

    return kernel.rows_of_a_part(x)


IMPLEMENTATIONS = {"reference": _by_reference, "triton": _by_triton}
