"""`batch_norm_relu`: batch normalization over channels and the ReLU that follows it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import impl as switch
from ..checks import FLOATS, check_same_device, check_shape, check_tensor, compute_dtype, not_contiguous
from ..launch import channels_last_of, operator, why_no_triton, without_second_derivative
from . import reference

switch.register("batchnorm_relu", "reference")
switch.register("batchnorm_relu", "triton", why_no_triton)

HALF = (torch.bfloat16, torch.float16)
# Up to this many rows a program takes all rows of its channels, and one launch does both passes.
FEW_ROWS = 4096


def _launch_statistics(x: Tensor) -> Tensor:
    from . import kernel

    return kernel.statistics(x)


def _fake_partials(x: Tensor, *_: Tensor) -> Tensor:
    from . import kernel

    return x.new_empty(kernel.parts_of(x), 2, x.shape[1], dtype=torch.float32)


def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor, partials: Tensor | None, *rest: Any) -> Any:
    from . import kernel

    result = kernel.forward(x, weight, bias, partials, *rest)
    *running, _, training, _, _, _ = rest
    for tensor in running:
        if training and tensor is not None and not tensor.is_inference():
            # Tell autograd that it was written, so that a graph that saved it fails instead of using new values.
            torch.autograd.graph.increment_version(tensor)
    return result


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, invstd = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, invstd


def _launch_gradient_sums(x: Tensor, grad: Tensor, *rest: Tensor) -> Tensor:
    from . import kernel

    return kernel.gradient_sums(x, grad, *rest)


def _launch_backward(x: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernel

    return kernel.backward(x, grad, *rest)


def _fake_backward(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


_statistics = operator("batch_norm_statistics(Tensor x) -> Tensor", _launch_statistics, _fake_partials)
_forward = operator(
    "batch_norm_relu(Tensor x, Tensor weight, Tensor bias, Tensor? partials, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, Tensor(c!)? counter, int processes, bool training, float? momentum, float eps,"
    " int? rows_of_part=None) -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_SAVED = "Tensor x, Tensor grad, Tensor weight, Tensor bias, Tensor mean, Tensor invstd"
_gradient_sums = operator(
    f"batch_norm_gradient_sums({_SAVED}) -> Tensor", _launch_gradient_sums, _fake_partials
)
_backward = operator(
    f"batch_norm_relu_backward({_SAVED}, Tensor? partials, int processes, bool training)"
    " -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


def _one_program(x: Tensor, processes: int) -> bool:
    """Return True if a single program takes all rows of a block of channels."""
    return processes == 1 and x.numel() // x.shape[1] <= FEW_ROWS


def _of_all_processes(x: Tensor, partials: Tensor, rows_of_part: int | None, processes: int) -> Tensor:
    """Return [processes,2,C], mean and M2 of each process's batch, from the partials of this process's programs."""
    from . import kernel

    own = kernel.joined_partials(x, partials, rows_of_part)[None]
    gathered = own.expand(processes, -1, -1).contiguous()
    dist.all_gather_into_tensor(gathered, own)
    return gathered


def _normalized(
    x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor | None, ...], processes: int,
    training: bool, momentum: float | None, eps: float, partials: Tensor | None, rows_of_part: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if partials is None and training and not _one_program(x, processes):
        partials = _statistics(x)
    if partials is not None and processes > 1:
        partials, rows_of_part = _of_all_processes(x, partials, rows_of_part, processes), None
    return _forward(x, weight, bias, partials, *running, processes, training, momentum, eps, rows_of_part)


class _BatchNormRelu(torch.autograd.Function):
    """The layer; it saves its input and the statistics, and computes the mask of the ReLU again from them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None,
        running_var: Tensor | None, counter: Tensor | None, processes: int, training: bool,
        momentum: float | None, eps: float, partials: Tensor | None, rows_of_part: int | None,
    ) -> Tensor:  # fmt: skip
        running = (running_mean, running_var, counter)
        rest = (processes, training, momentum, eps, partials, rows_of_part)
        y, mean, invstd = _normalized(x, weight, bias, running, *rest)
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        ctx.processes, ctx.training = processes, training
        # torch.compile knows no such setting.
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 12
        x, *saved = ctx.saved_tensors
        processes, training = ctx.processes, ctx.training
        grad = grad.contiguous(memory_format=channels_last_of(x))
        sums = own = None
        if not _one_program(x, processes):
            sums = _gradient_sums(x, grad, *saved)
            if training and processes > 1:
                own = sums.sum(dim=0)  # [2,C]
                sums = own[None].clone()
                dist.all_reduce(sums)
        gradients = _backward(x, grad, *saved, sums, processes, training)
        if own is not None:
            # Each process's part of a parameter's gradient is of its own batch.
            parameters = saved[:2]
            parts = own.flip(0).unbind()
            mine = [part.to(p.dtype) for part, p in zip(parts, parameters, strict=True)]
            gradients = (gradients[0], *mine)
        return (*without_second_derivative("batch_norm_relu", gradients), *(None,) * 9)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, running: dict[str, Tensor | None], counter: Tensor | None,
    training: bool, momentum: float | None, eps: float, processes: int,
) -> None:  # fmt: skip
    check_tensor("x", x, FLOATS)
    if x.ndim not in (4, 5):
        raise ValueError(f"x: expected shape (N, C, H, W) or (N, C, T, H, W), got {tuple(x.shape)}")
    vectors = {"weight": weight, "bias": bias, **{name: v for name, v in running.items() if v is not None}}
    dtypes = (compute_dtype(x), x.dtype) if x.dtype in HALF else (x.dtype,)
    for name, vector in vectors.items():
        check_tensor(name, vector, dtypes)
        check_shape(name, vector, (x.shape[1],))
        check_same_device("x", x, name, vector)
    if counter is not None:
        check_tensor("num_batches_tracked", counter, (torch.int64,))
        check_shape("num_batches_tracked", counter, ())
        check_same_device("x", x, "num_batches_tracked", counter)
    if not training:
        for name, statistics in running.items():
            if statistics is None:
                raise ValueError(f"{name}: expected a tensor with training=False, got None")
    elif processes * x.numel() == x.shape[1]:
        raise ValueError(
            f"x: expected more than 1 value per channel when training, got shape {tuple(x.shape)}"
        )
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum: expected a number in [0, 1] or None, got {momentum}")
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")
    if processes < 1:
        raise ValueError(f"processes: expected at least 1, got {processes}")


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    processes: int = 1,
    statistics: tuple[Tensor, int] | None = None,
    impl: str | None = None,
) -> Tensor:
    """Return relu((x - mean) / sqrt(var + eps) * weight + bias) for x [N,C,H,W] or [N,C,T,H,W].

    training=True takes mean and (biased) variance of each channel from x, moves `running_mean` and `running_var`
    [C] (unbiased) by `momentum` of the way towards them and adds 1 to `num_batches_tracked` (int64 []), each where
    given; a momentum of None averages over all calls counted there. training=False takes the running statistics.
    processes: in training, the statistics are taken over the batches, of one size, of this many processes in
    torch.distributed's default group, each of which makes this call. A parameter's gradient is of the own batch.
    statistics: in training, mean and M2 of x as `upsample_convolution_statistics` gives them, (float32 [P,2,C], rows
    of a part). The kernels then read x once less; the reference takes its own.

    x float32, bfloat16, float16 or float64; the vectors float32 (float64 for float64) or the dtype of x; computed in
    float32 (float64 for float64, which only the reference takes). y has the dtype of x. Differentiable in x, weight
    and bias, once with "triton": a second derivative raises RuntimeError. The Triton kernels read and write
    channels-last tensors; x in another layout is copied to channels-last first. They write contiguous running
    statistics; with others "auto" takes the reference.
    `impl`: "auto", "triton" or "reference"; None takes the process default (see `vglann_kernels.impl`).
    Raises TypeError on a wrong dtype, ValueError on a wrong shape, mixed devices, a wrong option, or a single value
    per channel in training. An empty x gives what F.batch_norm gives.
    """
    running = {"running_mean": running_mean, "running_var": running_var}
    _check(x, weight, bias, running, num_batches_tracked, training, momentum, eps, processes)
    partials, rows_of_part = statistics or (None, None)
    if partials is not None:
        check_tensor("statistics", partials, (compute_dtype(x),))
        check_shape("statistics", partials, ("P", 2, x.shape[1]))
        check_same_device("x", x, "statistics", partials)
        if not training:
            raise ValueError("statistics: expected None with training=False, got a tensor")
    unsupported = not_contiguous(**running)
    if x.dtype == torch.float64:
        unsupported = "x: expected a 16- or 32-bit float, got float64"
    chosen = switch.chosen("batchnorm_relu", impl, x.device, unsupported)
    if chosen == "reference" or x.numel() == 0:
        tensors = (x, weight, bias, running_mean, running_var, num_batches_tracked)
        return reference.batch_norm(*tensors, training, momentum, eps, processes, relu=True)
    counter = num_batches_tracked
    if momentum is None and training:
        if counter is None:
            momentum = 0.0
        else:
            counter.add_(1)
    if training and momentum == 0:
        running_mean = running_var = None
    x = x.contiguous(memory_format=channels_last_of(x))
    weight, bias = weight.contiguous(), bias.contiguous()
    rest = (running_mean, running_var, counter, processes, training, momentum, eps, partials, rows_of_part)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _BatchNormRelu.apply(x, weight, bias, *rest)
    return _normalized(x, weight, bias, rest[:3], *rest[3:])[0]
