"""The kernels of `upsample_convolution` in the interpreter."""

import pytest
import torch
from counted import Traffic, poisoned
from vglann_kernels import batch_norm_relu, upsample_convolution, upsample_convolution_statistics, verify
from vglann_kernels import impl as switch
from vglann_kernels.batchnorm_relu import kernel as batchnorm_kernel
from vglann_kernels.batchnorm_relu import op as batchnorm_relu
from vglann_kernels.upsample_conv import kernel, reference, weight_gradient
from vglann_kernels.verify_convolution import joined_statistics

from vglann_fast.glo.generator import TwoStreamGenerator

FORWARD = torch.ops.vglann_kernels.upsample_conv.default
BY_INPUT = torch.ops.vglann_kernels.upsample_conv_input_gradient.default
BY_WEIGHT = torch.ops.vglann_kernels.upsample_conv_weight_gradient.default


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def surrounded(x):
    """The same values, with NaN before and behind them in memory."""
    around = channels_last(torch.full((len(x) + 2, *x.shape[1:]), float("nan"), dtype=x.dtype))
    around[1:-1] = x
    return around[1:-1]


def inputs(shape, outputs, dtype=torch.float32, rectifying=False):
    """x, weight, bias, an upstream gradient, and scale and shift, by which no value comes near 0."""
    x = torch.randn(shape)
    x = x.sign() * (x.abs() + 0.1)
    weight = torch.randn(shape[1], outputs, *[4] * (len(shape) - 2)) / shape[1] ** 0.5
    upstream = torch.randn(shape[0], outputs, *(2 * size for size in shape[2:]))
    x, weight, upstream = (value.to(dtype) for value in (x, weight, upstream))
    scaling = ()
    if rectifying:
        scaling = (torch.rand(shape[1]) + 0.5) * torch.randn(shape[1]).sign(), 0.04 * torch.rand(shape[1])
    return surrounded(x), channels_last(weight), torch.randn(outputs), surrounded(upstream), *scaling


def results(impl, x, weight, bias, upstream, *scaling):
    """Output and gradients; the reference in float64."""
    wide = torch.float64 if impl == "reference" else None
    given = [x, weight, bias, *scaling]
    leaves = [value.detach().to(wide or value.dtype).requires_grad_() for value in given]
    named = dict(zip(("scale", "shift"), leaves[3:], strict=False))
    y = upsample_convolution(*leaves[:3], **named, impl=impl)
    y.backward(upstream.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def check(given, tolerance):
    with poisoned():
        ours = results("triton", *given)
    for value, exact in zip(ours, results("reference", *given), strict=True):
        assert (value.double() - exact).norm() <= tolerance * exact.norm()


# 15 images in several tiles; several blocks of channels; few outputs and more, without remainders; one of everything.
SHAPES = [
    ((15, 18, 3, 3), 3),
    ((2, 70, 1, 1), 70),
    ((1, 16, 2, 3, 5), 4),
    ((1, 16, 1, 2, 3), 16),
    ((1, 1, 1, 1), 1),
]


def test_against_float64():
    for line in verify.upsample_conv(verify.Shapes(batch=2, device="cpu", dtype="float32")):
        assert line.ok, str(line)


@pytest.mark.parametrize(("shape", "outputs"), SHAPES, ids=str)
def test_odd_shapes_leave_nothing_unwritten_and_read_nothing_outside(shape, outputs):
    check(inputs(shape, outputs, rectifying=outputs in (3, 16, 70)), 2e-6)


@pytest.mark.parametrize(("shape", "outputs"), [SHAPES[2], SHAPES[3]], ids=str)
def test_in_half_precision(shape, outputs):
    check(inputs(shape, outputs, torch.float16, rectifying=True), 1e-3)


def take_tiles_of(rows, monkeypatch):
    """Tiles of the forward pass and of the gradient by x have so many positions, steps of the other gradient, too."""
    monkeypatch.setattr(kernel, "tile_rows", lambda wide: rows)
    for module, name, letter in (
        (kernel, "forward_tiles", "M"),
        (kernel, "input_gradient_tiles", "M"),
        (weight_gradient, "weight_gradient_tiles", "P"),
    ):
        plain = getattr(module, name)
        changed = lambda *given, plain=plain, letter=letter: {**plain(*given), letter: rows}  # noqa: E731
        monkeypatch.setattr(module, name, changed)


@pytest.mark.parametrize(("shape", "outputs"), [SHAPES[0], SHAPES[3]], ids=str)
def test_statistics_are_of_y_as_it_is_stored(shape, outputs, monkeypatch):
    take_tiles_of(16, monkeypatch)
    monkeypatch.setattr(kernel, "PARTS", 4)
    x, weight, bias, *_ = inputs(shape, outputs, torch.float16)
    with poisoned():
        y, (parts, rows) = upsample_convolution_statistics(x, weight, bias + 50, impl="triton")
    assert len(parts) == 4
    exact = reference.statistics(y.double())[0]
    torch.testing.assert_close(joined_statistics(y, parts, rows), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "upstream",
    [
        lambda y: (3 * y).sum(),  # expanded, not 1
        lambda y: y[:, 1:, ::2].sum(),
        lambda y: (y.transpose(2, 3) * torch.arange(4.0).to(y.dtype)).sum(),
    ],
)
def test_any_upstream_gradient(upstream):
    x, weight, bias, _ = inputs((1, 3, 2, 2), 3)
    gradients = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [value.to(dtype).requires_grad_() for value in (x, weight, bias)]
        gradients.append(torch.autograd.grad(upstream(upsample_convolution(*leaves, impl=impl)), leaves))
    for ours, exact in zip(*gradients, strict=True):
        assert (ours - exact).norm() <= 1e-5 * exact.norm() + 1e-6


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,)], ids=["x", "weight", "bias", "scale"])
def test_only_what_is_asked_for_is_computed(needed):
    x, weight, bias, upstream, scale, shift = inputs((2, 5, 2, 3), 3, rectifying=True)
    gradients = []
    for impl in ("triton", "reference"):
        leaves = [value.detach().clone() for value in (x, weight, bias, scale)]
        wanted = [leaves[i].requires_grad_() for i in needed]
        y = upsample_convolution(*leaves[:3], scale=leaves[3], shift=shift, impl=impl)
        gradients.append(torch.autograd.grad(y, wanted, upstream))
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not upsample_convolution(x, weight, impl="triton").requires_grad


def test_weights_in_another_layout_give_the_same():
    x, weight, bias, upstream = inputs((2, 5, 3, 4), 4)
    expected = results("triton", x, weight, bias, upstream)
    for ours, other in zip(results("triton", x, weight.contiguous(), bias, upstream), expected, strict=True):
        assert torch.equal(ours, other)
    assert expected[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("outputs", "reached"), [(9, 3), (2, 4)])
def test_nan_gets_through_the_rectification_to_its_neighbors_alone(outputs, reached):
    """With few outputs one row further: products with weights that are 0 are NaN, too."""
    x, weight, bias, *_, scale, shift = inputs((1, 3, 4, 4), outputs, rectifying=True)
    x[0, 1, 0, 0] = float("nan")
    y = upsample_convolution(x, weight, bias, scale=scale, shift=shift, impl="triton")
    assert y[:, :, :3, :3].isnan().all()
    assert y[:, :, reached:].isfinite().all()
    assert y[:, :, :, reached:].isfinite().all()


def test_two_runs_are_equal_bit_for_bit():
    given = inputs((15, 2, 3, 3), 3, rectifying=True)
    for first, second in zip(results("triton", *given), results("triton", *given), strict=True):
        assert torch.equal(first, second)


def test_what_is_refused_where_the_kernel_is_asked_for():
    x, weight, bias, _ = inputs((2, 5, 3, 4), 4)
    with pytest.raises(ValueError, match="x: expected a channels-last tensor, got strides"):
        upsample_convolution(x.contiguous(), weight, impl="triton")
    with pytest.raises(ValueError, match="x: expected a 16- or 32-bit float, got float64"):
        upsample_convolution(x.double(), weight.double(), impl="triton")
    empty = upsample_convolution(x[:0], weight, bias, impl="triton")
    assert empty.shape == (0, 4, 6, 8)


def test_a_measured_choice_is_for_its_layer_alone_and_falls_back_where_one_that_was_asked_for_raises():
    x, weight, *_ = inputs((1, 3, 2, 2), 2)
    bytes_of = []
    with switch.preferring({"upsample_conv 2d 3-2": "triton"}):
        for image, weights in ((x, weight), (x, weight[:, :1]), (x.contiguous(), weight)):
            with Traffic() as traffic:
                y = upsample_convolution(image, weights)
            bytes_of.append(traffic.bytes)
    assert bytes_of[0] > 0 == bytes_of[1] == bytes_of[2]
    assert torch.equal(y, reference.upsample_conv(x.contiguous(), weight, None, None, None))


def test_a_second_derivative_is_refused():
    x, weight, *_ = inputs((1, 3, 2, 2), 2)
    x.requires_grad_()
    y = upsample_convolution(x, weight, impl="triton").square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_under_autocast_float32_tensors_are_cast():
    x, weight, bias, _ = inputs((1, 3, 2, 2), 2)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        y = upsample_convolution(x, weight, bias, impl="triton")
    expected = upsample_convolution(x.half(), weight.half(), bias, impl="triton")
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_opcheck():
    x, weight, bias, upstream, *scaling = inputs((2, 6, 1, 2), 3, rectifying=True)
    torch.library.opcheck(FORWARD, (x, weight, bias, *scaling, True))
    torch.library.opcheck(BY_INPUT, (upstream, weight, x, *scaling))
    torch.library.opcheck(BY_WEIGHT, (upstream, weight, x, None, None, True))


def test_traces_into_one_graph():
    x, weight, bias, *_ = inputs((2, 6, 2, 3), 3)
    found = []
    plain = lambda *given: upsample_convolution(*given, impl="triton").square().sum()  # noqa: E731
    torch.compiler.reset()
    for function in (plain, torch.compile(plain, fullgraph=True, backend="aot_eager")):
        leaves = [value.detach().clone().requires_grad_() for value in (x, weight, bias)]
        function(*leaves).backward()
        found.append([leaf.grad for leaf in leaves])
    for traced, eager in zip(*found, strict=True):
        assert torch.equal(traced, eager)


def test_a_batch_norm_takes_the_statistics_and_does_not_read_x_for_them(monkeypatch):
    monkeypatch.setattr(batchnorm_relu, "FEW_ROWS", 0)
    monkeypatch.setattr(kernel, "PARTS", 4)
    x, weight, *_ = inputs((4, 8, 3, 5), 16)
    norm_weight, norm_bias = torch.rand(16) + 0.5, torch.randn(16)
    y, statistics = upsample_convolution_statistics(x, weight, impl="triton")
    found, bytes_read = [], []
    for given in (statistics, None):
        leaf = y.clone().requires_grad_()
        running = [torch.zeros(16), torch.ones(16), torch.tensor(0)]
        with Traffic() as traffic:
            z = batch_norm_relu(leaf, norm_weight, norm_bias, *running, statistics=given, impl="triton")
        bytes_read.append(traffic.bytes)
        z.square().sum().backward()
        found.append([z.detach(), leaf.grad, *running])
    for ours, own in zip(*found, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    # What a process hands to the others.
    own = batchnorm_kernel.joined_partials(y, *statistics)
    torch.testing.assert_close(own, reference.statistics(y)[0], rtol=1e-4, atol=1e-5)
    assert bytes_read[1] - bytes_read[0] > 0.9 * 4 * y.numel()
    with pytest.raises(ValueError, match=r"statistics: expected shape \(P, 2, 16\), got"):
        batch_norm_relu(y, norm_weight, norm_bias, statistics=(statistics.parts[:, :1], 1), impl="triton")
    with pytest.raises(ValueError, match="statistics: expected None with training=False"):
        rest = {"training": False, "running_mean": norm_bias, "running_var": norm_weight}
        batch_norm_relu(y, norm_weight, norm_bias, statistics=statistics, **rest)


def test_the_whole_generator_is_the_one_with_the_framework_s_convolutions(monkeypatch):
    """And with the norms by their kernel, which takes the statistics from the convolution where rows are many."""
    take_tiles_of(1024, monkeypatch)
    monkeypatch.setattr(batchnorm_relu, "FEW_ROWS", 100)
    generator = TwoStreamGenerator("original", 8, 2, frames=16, size=16).channels_last()
    state = {name: value.clone() for name, value in generator.state_dict().items()}
    z, results = torch.randn(2, 8), []
    for impl, dtype in (
        ("reference,upsample_conv=triton,batchnorm_relu=triton", torch.float32),
        ("reference", torch.float64),
    ):
        generator.load_state_dict(state)
        generator.to(dtype).zero_grad()
        with switch.using_impl(impl):
            head, background = generator.logits(z.to(dtype))
            (head.square().mean() + background.square().mean()).backward()
        results.append([head, background, *(parameter.grad for parameter in generator.parameters())])
    for ours, exact in zip(*results, strict=True):
        assert 0 < (ours.double() - exact).norm() <= 1e-4 * exact.norm()


def test_traffic():
    """Each address once: x, weights, y. In all, x for each of 9 shifts inside, the weights for each tile."""
    x, weight, *_ = inputs((1, 64, 16, 8), 4, torch.float16)
    with Traffic() as forward:
        y = upsample_convolution(x, weight, impl="triton")
    floor = 2 * (x.numel() + weight.numel() + y.numel())
    assert floor <= forward.unique <= 1.001 * floor
    assert forward.bytes <= 2 * (9 * x.numel() + weight.numel() + y.numel())
