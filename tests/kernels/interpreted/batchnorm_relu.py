"""The kernels of `batch_norm_relu` in the interpreter."""

import pytest
import torch
from counted import Traffic, poisoned
from forked_process import ranks
from vglann_kernels import batch_norm_relu, verify
from vglann_kernels.batchnorm_relu import kernel, op

FORWARD = torch.ops.vglann_kernels.batch_norm_relu.default
BACKWARD = torch.ops.vglann_kernels.batch_norm_relu_backward.default
STATISTICS = torch.ops.vglann_kernels.batch_norm_statistics.default
GRADIENT_SUMS = torch.ops.vglann_kernels.batch_norm_gradient_sums.default


@pytest.fixture(params=["one program", "several programs"], autouse=True)
def share(request, monkeypatch):
    """Both ways of sharing the rows, whatever the size; tiles so small that there are several."""
    monkeypatch.setattr(op, "FEW_ROWS", 10**9 if request.param == "one program" else 0)
    for name in ("STATISTICS_TILE", "FORWARD_TILE", "GRADIENT_TILE", "FEW_TILE"):
        monkeypatch.setattr(kernel, name, 512)
    monkeypatch.setattr(kernel, "processors", lambda device: 6)
    return request.param


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def inputs(shape, dtype=torch.float32, center=0.0, scale=1.0):
    """x, weight, bias and an upstream gradient that is 0 where rounding decides the ReLU."""
    x = channels_last((torch.randn(shape) * scale + center).to(dtype))
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    exact = torch.nn.functional.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)
    near = exact.abs() < (1e-3 if center == 0 else 0.1)
    return x, weight, bias, channels_last(torch.randn(shape).to(dtype).masked_fill(near, 0.0))


def results(impl, x, weight, bias, upstream, **options):
    """Output, gradients and running statistics; the reference in float64."""
    wide = torch.float64 if impl == "reference" else None
    x, weight, bias = (value.detach().to(wide or value.dtype).requires_grad_() for value in (x, weight, bias))
    running = [torch.linspace(-1, 1, x.shape[1]), torch.linspace(0.5, 2, x.shape[1])]
    running = [value.to(wide or value.dtype) for value in running]
    counter = torch.tensor(4)
    y = batch_norm_relu(x, weight, bias, *running, counter, impl=impl, **options)
    y.backward(upstream.to(y.dtype))
    return [y.detach(), x.grad, weight.grad, bias.grad, *running, counter.double()]


def check(given, tolerance, **options):
    """Errors are relative to the norm of a value and of what went into it, of which little may be left."""
    size = given[-1].double().norm()
    with poisoned():
        ours = results("triton", *given, **options)
    for value, exact in zip(ours, results("reference", *given, **options), strict=True):
        assert (value.double() - exact).norm() <= tolerance * (exact.norm() + size)


def test_against_float64():
    for line in verify.batchnorm_relu(verify.Shapes(batch=2, frames=2, size=16, device="cpu")):
        assert line.ok, str(line)


SHAPES = [(2, 5, 3, 7), (4, 1, 2, 2), (3, 64, 2, 5, 4), (2, 100, 9, 7), (6, 70, 2, 1, 1), (5, 3, 1, 40, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes_leave_nothing_unwritten(shape):
    check(inputs(shape), 5e-6)


@pytest.mark.parametrize("options", [{"training": False}, {"momentum": None}, {"momentum": 0.0}], ids=str)
def test_other_ways_with_the_running_statistics(options):
    check(inputs((3, 20, 2, 5, 4)), 5e-6, **options)


@pytest.mark.parametrize("training", [False, True])
def test_in_half_precision(training):
    check(inputs((3, 20, 5, 5), torch.float16), 1e-3, training=training)


def test_a_large_mean_against_a_small_deviation_costs_no_digits():
    """A float32 sum of squares would lose all of them: 1000² / 0.1² is 10⁸. One rounding step of x is 3e-4 of it."""
    given = inputs((4, 6, 30, 9), center=1000.0, scale=0.1)
    check(given, 1e-3)
    check(inputs((4, 6, 30, 9), torch.float16, center=1000.0, scale=2.0), 1e-3)


def test_a_first_row_far_from_the_others_costs_no_digits():
    x, weight, bias, _ = inputs((2, 4, 50, 3))
    x[0, :, 0, 0] = 1e6
    y = batch_norm_relu(x, weight, bias, impl="triton")
    exact = batch_norm_relu(x.double(), weight.double(), bias.double(), impl="reference")
    assert (y - exact).norm() <= 1e-5 * exact.norm()


def test_partial_statistics_join_to_those_of_all_rows():
    x = inputs((3, 9, 20, 3), center=50.0)[0]
    mean, m2 = kernel.joined_partials(x, kernel.statistics(x))
    exact = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(m2.double(), exact.var(1, correction=0) * exact.shape[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "upstream",
    [
        lambda y: (3 * y).sum(),  # expanded, not 1
        lambda y: y[:, 1:, ::2].sum(),
        lambda y: (y.transpose(2, 3) * torch.arange(4.0).to(y.dtype)).sum(),
        lambda y: torch.cat([y, y * 2], dim=1).square().sum(),
    ],
)
def test_any_upstream_gradient(upstream):
    x, weight, bias, _ = inputs((2, 6, 4, 5))
    gradients = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [value.to(dtype).requires_grad_() for value in (x, weight, bias)]
        gradients.append(torch.autograd.grad(upstream(batch_norm_relu(*leaves, impl=impl)), leaves))
    for ours, exact in zip(*gradients, strict=True):
        assert (ours - exact).norm() <= 1e-5 * exact.norm() + 1e-6


def test_a_contiguous_input_is_copied_to_channels_last_and_gives_the_same():
    x, weight, bias, upstream = inputs((2, 5, 3, 4, 6))
    expected = results("triton", x, weight, bias, upstream)
    given = results("triton", x.contiguous(), weight, bias, upstream.contiguous())
    assert given[0].is_contiguous(memory_format=torch.channels_last_3d)
    for ours, other in zip(given, expected, strict=True):
        assert torch.equal(ours, other)


def test_nan_stays_in_its_channel_and_gets_through_the_relu():
    x, weight, bias, _ = inputs((2, 4, 3, 3))
    x[1, 2, 0, 0] = float("nan")
    y = batch_norm_relu(x, weight, bias, impl="triton")
    assert y[:, 2].isnan().all()
    assert y[:, [0, 1, 3]].isfinite().all()


def test_two_runs_are_equal_bit_for_bit():
    given = inputs((3, 70, 9, 5))
    for first, second in zip(results("triton", *given), results("triton", *given), strict=True):
        assert torch.equal(first, second)


def test_without_running_statistics_and_with_some_gradients_only():
    x, weight, bias, _ = inputs((2, 5, 4, 3))
    y = batch_norm_relu(x, weight, bias, impl="triton")
    assert not y.requires_grad
    weight.requires_grad_()
    batch_norm_relu(x, weight, bias, impl="triton").sum().backward()
    exact = weight.detach().double().requires_grad_()
    batch_norm_relu(x.double(), exact, bias.double(), impl="reference").sum().backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_what_batch_norm_refuses_and_an_empty_batch():
    weight, bias = torch.ones(3), torch.zeros(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm_relu(torch.zeros(1, 3, 1, 1), weight, bias, impl="triton")
    assert batch_norm_relu(torch.zeros(0, 3, 2, 2), weight, bias, impl="triton").shape == (0, 3, 2, 2)
    with pytest.raises(ValueError, match="x: expected a 16- or 32-bit float, got float64"):
        batch_norm_relu(torch.zeros(2, 3, 1, 1).double(), weight.double(), bias.double(), impl="triton")


def test_a_second_derivative_is_refused():
    x, weight, bias, _ = inputs((2, 3, 4, 4))
    x.requires_grad_()
    y = batch_norm_relu(x, weight, bias, impl="triton").square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_saved_are_the_input_and_vectors():
    x, weight, bias, _ = inputs((2, 5, 6, 4))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        batch_norm_relu(x.requires_grad_(), weight, bias, impl="triton")
    assert sorted(tensor.numel() for tensor in saved) == [5, 5, 5, 5, x.numel()]


@pytest.mark.parametrize("share", ["several programs"], indirect=True)
def test_opcheck():
    x, weight, bias, upstream = inputs((2, 6, 4, 3))
    running = (torch.zeros(6), torch.ones(6), torch.tensor(0))
    torch.library.opcheck(STATISTICS, (x,))
    for partials in (None, STATISTICS(x)):
        for training in (True, False):
            rest = (*running, 1, training, 0.1, 1e-5)
            torch.library.opcheck(FORWARD, (x, weight, bias, partials, *rest))
    _, mean, invstd = FORWARD(x, weight, bias, None, *running, 1, True, 0.1, 1e-5)
    saved = (x, upstream, weight, bias, mean, invstd)
    torch.library.opcheck(GRADIENT_SUMS, saved)
    for partials in (None, GRADIENT_SUMS(*saved)):
        torch.library.opcheck(BACKWARD, (*saved, partials, 1, True))


def test_traces_into_one_graph():
    x, weight, bias, _ = inputs((2, 6, 4, 3))
    found = []
    plain = lambda *given: batch_norm_relu(*given, impl="triton").square().sum()  # noqa: E731
    torch.compiler.reset()
    for function in (plain, torch.compile(plain, fullgraph=True, backend="aot_eager")):
        leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
        running = [torch.zeros(6), torch.ones(6), torch.tensor(0)]
        function(*leaves, *running).backward()
        found.append([*(leaf.grad for leaf in leaves), *running])
    for traced, eager in zip(*found, strict=True):
        assert torch.equal(traced, eager)
    assert found[0][-1].item() == 1


def test_traffic(share, monkeypatch):
    """Bytes over the floor: x twice and y; x and the gradient twice, and x's gradient."""
    monkeypatch.undo()
    monkeypatch.setattr(op, "FEW_ROWS", 10**9 if share == "one program" else 0)
    x, weight, bias, upstream = inputs((2, 64, 8, 16, 16), torch.float16)
    x.requires_grad_()
    with Traffic() as forward:
        y = batch_norm_relu(x, weight, bias, torch.zeros(64), torch.ones(64), torch.tensor(0), impl="triton")
    once = 2 * x.numel()
    assert forward.bytes <= 1.02 * 3 * once
    assert forward.unique <= 1.02 * 2 * once
    with Traffic() as backward:
        y.backward(upstream)
    assert backward.bytes <= 1.02 * 5 * once


PROCESS = """
import os, sys, torch, torch.distributed as dist
from vglann_kernels import batch_norm_relu
rank, impl, path = int(os.environ["RANK"]), *sys.argv[1:]
dist.init_process_group("gloo")
x, weight, bias, upstream = torch.load(path)
half = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
dtype = torch.float64 if impl == "reference" else torch.float32
leaves = [value.to(dtype).requires_grad_() for value in (x[half], weight, bias)]
running = [torch.zeros(x.shape[1], dtype=dtype), torch.ones(x.shape[1], dtype=dtype), torch.tensor(0)]
y = batch_norm_relu(*leaves, *running, processes=2, impl=impl)
y.backward(upstream[half].to(dtype))
torch.save([y.detach(), *(leaf.grad for leaf in leaves), *running], f"{path}.{rank}")
"""


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_several_processes_normalize_by_the_statistics_of_all_batches(impl, share, tmp_path):
    if share == "one program" and impl == "reference":
        pytest.skip("the reference has one way of sharing the rows")
    given, path = inputs((4, 5, 6, 7), center=3.0), tmp_path / "given"
    torch.save(given, path)
    started = ranks(PROCESS, impl, path, folder=tmp_path)
    assert [process.wait(120) for process in started] == [0, 0], [process.said() for process in started]
    parts = zip(*(torch.load(f"{path}.{rank}") for rank in range(2)), strict=True)
    y, grad, grad_weight, grad_bias, mean, var, counter = parts
    x, weight, bias, upstream = given
    leaves = [value.double().requires_grad_() for value in (x, weight, bias)]
    running = [torch.zeros(5).double(), torch.ones(5).double(), torch.tensor(0)]
    exact = batch_norm_relu(*leaves, *running, impl="reference")
    exact.backward(upstream.double())
    torch.testing.assert_close(torch.cat(y).double(), exact.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(grad).double(), leaves[0].grad, rtol=1e-5, atol=1e-5)
    # Each process has the gradient of its own batch; the training adds them up.
    torch.testing.assert_close(sum(grad_weight).double(), leaves[1].grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(grad_bias).double(), leaves[2].grad, rtol=1e-5, atol=1e-5)
    for own in (mean, var, counter):
        assert torch.equal(own[0], own[1])
    torch.testing.assert_close(mean[0].double(), running[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var[0].double(), running[1], rtol=1e-5, atol=1e-6)
    assert counter[0].item() == 1


def test_vectors_of_any_strides_are_read_and_only_contiguous_ones_are_written():
    torch.manual_seed(0)
    x, *_ = inputs((2, 4, 3, 3))
    spread = torch.randn(8).requires_grad_()
    results = {}
    for impl in ("triton", "reference"):
        y = batch_norm_relu(x, spread[::2], spread[:1].expand(4), impl=impl)
        results[impl] = (y.detach(), *torch.autograd.grad(y.square().sum(), spread))
    torch.testing.assert_close(results["triton"], results["reference"], rtol=1e-4, atol=1e-5)
    running = torch.zeros(8)
    with pytest.raises(ValueError, match="running_mean: expected a contiguous tensor"):
        batch_norm_relu(x, torch.ones(4), torch.zeros(4), running[::2], torch.ones(4), impl="triton")
    assert not running.any()
