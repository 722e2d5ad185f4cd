"""`upsample_convolution`: definition, gradient, what it refuses. The kernels: interpreted/upsample_conv.py."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from vglann_kernels import impl as switch
from vglann_kernels import resolve, upsample_convolution, upsample_convolution_statistics


def arguments(shape=(2, 3, 4, 2), outputs=2, dtype=torch.float64):
    torch.manual_seed(0)
    weight = torch.randn(shape[1], outputs, *[4] * (len(shape) - 2), dtype=dtype)
    bias, scale, shift = (torch.randn(n, dtype=dtype) for n in (outputs, shape[1], shape[1]))
    return torch.randn(shape, dtype=dtype), weight, bias, scale, shift


@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (2, 3, 3, 2, 4)], ids=len)
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_transposed_convolution_of_the_generator(shape, with_bias):
    x, weight, bias, *_ = arguments(shape)
    kind = torch.nn.ConvTranspose2d if x.ndim == 4 else torch.nn.ConvTranspose3d
    layer = kind(shape[1], 2, 4, 2, 1, bias=with_bias, dtype=x.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if with_bias:
            layer.bias.copy_(bias)
    y = upsample_convolution(x, weight, bias if with_bias else None)
    assert y.shape == (shape[0], 2, *(2 * size for size in shape[2:]))
    assert torch.equal(y, layer(x))


def test_each_value_is_the_formula_written_out():
    x, weight, bias, *_ = arguments()
    y = upsample_convolution(x, weight, bias)
    for n, o, row, column in itertools.product((0, 1), (0, 1), (0, 3, 7), (0, 1, 2)):
        value = bias[o].clone()
        for k, m in itertools.product(range(4), repeat=2):
            # 2 i - 1 + k is the row of y that row i of x meets with row k of the kernel.
            i, j = (row + 1 - k) / 2, (column + 1 - m) / 2
            if i.is_integer() and j.is_integer() and 0 <= i < 4 and 0 <= j < 2:
                value += (x[n, :, int(i), int(j)] * weight[:, o, k, m]).sum()
        assert y[n, o, row, column].item() == pytest.approx(value.item(), abs=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 3, 2), (2, 3, 2, 1, 2)], ids=len)
def test_scale_and_shift_are_a_batch_norm_and_its_relu(shape):
    x, weight, bias, scale, shift = arguments(shape)
    mean, var, eps = torch.randn(3).double(), torch.rand(3).double() + 0.5, 1e-5
    invstd = torch.rsqrt(var + eps)
    expected = F.batch_norm(x, mean, var, scale, shift, False, 0.0, eps).relu()
    expected = upsample_convolution(expected, weight, bias)
    y = upsample_convolution(x, weight, bias, scale=scale * invstd, shift=shift - mean * scale * invstd)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_statistics_are_the_mean_and_the_squared_differences_of_each_channel():
    x, weight, *_ = arguments((2, 3, 2, 3, 2))
    y, statistics = upsample_convolution_statistics(x.requires_grad_(), weight)
    assert torch.equal(y, upsample_convolution(x, weight))
    assert statistics.parts.shape == (1, 2, 2)
    assert statistics.rows == y.numel() // 2
    assert not statistics.parts.requires_grad
    mean, m2 = statistics.parts[0]
    torch.testing.assert_close(mean, y.mean((0, 2, 3, 4)))
    torch.testing.assert_close(m2 / statistics.rows, y.var((0, 2, 3, 4), correction=0))


@pytest.mark.parametrize("shape", [(2, 2, 2, 3), (1, 2, 2, 1, 2)], ids=len)
def test_gradcheck(shape):
    inputs = [value.requires_grad_() for value in arguments(shape)]

    def function(x, weight, bias, scale, shift):
        return upsample_convolution(x, weight, bias, scale=scale, shift=shift)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradcheck(upsample_convolution, inputs[:3])


def test_an_empty_batch_gives_an_empty_result_and_gradients_of_zero():
    _, weight, bias, *_ = arguments()
    x = torch.zeros(0, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    y = upsample_convolution(x, weight.requires_grad_(), bias)
    assert y.shape == (0, 2, 8, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()


def test_auto_takes_the_convolution_of_the_framework_even_where_the_kernel_runs(monkeypatch):
    switch.implementations("upsample_conv")
    monkeypatch.setitem(switch._registered["upsample_conv"], "triton", lambda device: None)
    monkeypatch.delenv("VGLANN_KERNELS", raising=False)
    choice = resolve("upsample_conv", device="cuda")
    assert choice.impl == "reference"
    assert "unless asked" in choice.reason
    assert resolve("upsample_conv", "triton", "cuda").impl == "triton"


def test_under_autocast_it_is_computed_in_half_precision():
    x, weight, bias, *_ = (value.float() for value in arguments())
    with torch.autocast("cpu", torch.bfloat16):
        y = upsample_convolution(x, weight, bias)
        assert upsample_convolution(x.bfloat16(), weight, bias).dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 5)}, ValueError, r"x: expected shape \(N, C, H, W\) or .*, got \(3, 5\)"),
        ({"x": torch.zeros(2, 3, 4, 2).int()}, TypeError, "x: expected float32 or .*, got int32"),
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.zeros(2, 4, 4, 2).double()}, ValueError, r"weight: expected shape \(4, outputs, 4, 4\), got"),
        ({"weight": torch.zeros(3, 2, 4, 3).double()}, ValueError, r"weight: .*got \(3, 2, 4, 3\)"),
        ({"weight": torch.zeros(3, 2, 4, 4, 4).double()}, ValueError, "weight: expected shape"),
        ({"weight": torch.zeros(3, 2, 4, 4)}, TypeError, "weight: expected float64, got float32"),
        ({"weight": torch.zeros(3, 2, 4, 4, device="meta").double()}, ValueError, "weight: expected device cpu"),
        ({"bias": torch.zeros(3).double()}, ValueError, r"bias: expected shape \(2,\), got \(3,\)"),
        ({"scale": torch.zeros(3)}, TypeError, "scale: expected float64, got float32"),
        ({"shift": torch.zeros(2).double()}, ValueError, r"shift: expected shape \(3,\), got \(2,\)"),
        ({"shift": None}, ValueError, "shift: expected both scale and shift"),
        ({"scale": None}, ValueError, "scale: expected both scale and shift"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(change, error, message):
    names = ("x", "weight", "bias", "scale", "shift")
    given = {**dict(zip(names, arguments(), strict=True)), **change}
    with pytest.raises(error, match=message):
        upsample_convolution(**given)


def test_traces_into_one_graph():
    x, weight, bias, scale, shift = (value.float() for value in arguments())
    results = []
    traced = torch.compile(upsample_convolution, fullgraph=True, backend="aot_eager")
    for function in (upsample_convolution, traced):
        leaf = x.clone().requires_grad_()
        y = function(leaf, weight, bias, scale=scale, shift=shift)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad])
    for traced, plain in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)
