"""`batch_norm_relu`: its definition, its gradient, what it refuses. The kernels: interpreted/batchnorm_relu.py."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from vglann_kernels import batch_norm_relu


def arguments(shape=(3, 5, 4, 2), dtype=torch.float64):
    torch.manual_seed(0)
    channels = shape[1]
    weight, bias, mean = (torch.randn(channels, dtype=dtype) for _ in range(3))
    return torch.randn(shape, dtype=dtype), weight, bias, mean, torch.rand(channels, dtype=dtype) + 0.5


@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (2, 3, 3, 2, 4)], ids=len)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_it_is_batch_norm_then_relu(shape, last, training):
    x, weight, bias, mean, var = arguments(shape)
    if last:
        x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    layer = (torch.nn.BatchNorm2d if x.ndim == 4 else torch.nn.BatchNorm3d)(shape[1], dtype=x.dtype)
    with torch.no_grad():
        for own, value in zip((layer.weight, layer.bias), (weight, bias), strict=True):
            own.copy_(value)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    expected = layer.train(training)(x).relu()
    counter = torch.tensor(0)
    y = batch_norm_relu(x, weight, bias, mean, var, counter, training=training)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, layer.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var, layer.running_var, rtol=1e-12, atol=1e-12)
    assert counter.item() == layer.num_batches_tracked.item() == int(training)


def test_each_value_is_the_formula_written_out():
    x, weight, bias, *_ = arguments()
    y = batch_norm_relu(x, weight, bias)
    for n, c, h, w in ((0, 0, 0, 0), (2, 4, 3, 1), (1, 2, 2, 0)):
        channel = x[:, c]
        deviation = ((channel - channel.mean()).square().mean() + 1e-5).sqrt()
        value = (x[n, c, h, w] - channel.mean()) / deviation * weight[c] + bias[c]
        assert y[n, c, h, w].item() == pytest.approx(max(0.0, value.item()), abs=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_gradcheck(training):
    x, weight, bias, mean, var = arguments((2, 3, 2, 2))
    inputs = [value.requires_grad_() for value in (x, weight, bias)]

    def function(*leaves):
        return batch_norm_relu(*leaves, mean.clone(), var.clone(), training=training)

    assert torch.autograd.gradcheck(function, inputs)


def test_without_a_momentum_the_statistics_are_averages_over_all_calls():
    x, weight, bias, mean, var = arguments()
    counter, batches = torch.tensor(0), [x, 2 * x + 1, x - 3]
    for batch in batches:
        batch_norm_relu(batch, weight, bias, mean, var, counter, momentum=None)
    torch.testing.assert_close(mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    torch.testing.assert_close(var, torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0))
    assert counter.item() == 3


def test_half_precision_is_computed_in_float32():
    x, weight, bias, *_ = (value.float() for value in arguments())
    exact = batch_norm_relu(x.bfloat16().double(), weight.double(), bias.double())
    y = batch_norm_relu(x.bfloat16(), weight, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, exact.bfloat16())


def test_an_empty_batch_gives_what_batch_norm_gives():
    _, weight, bias, mean, var = arguments()
    before = mean.clone(), var.clone()
    y = batch_norm_relu(torch.zeros(0, 5, 4, 2, dtype=torch.float64), weight, bias, mean, var)
    assert y.shape == (0, 5, 4, 2)
    expected = [value.clone() for value in before]
    F.batch_norm(torch.zeros(0, 5, 4, 2, dtype=torch.float64), *expected, weight, bias, True, 0.1)
    assert torch.equal(mean, expected[0])
    assert torch.equal(var, expected[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 5)}, ValueError, r"x: expected shape \(N, C, H, W\) or .*, got \(3, 5\)"),
        ({"x": torch.zeros(3, 5, 4, 2).int()}, TypeError, "x: expected float32 or .*, got int32"),
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"weight": torch.zeros(4).double()}, ValueError, r"weight: expected shape \(5,\), got \(4,\)"),
        ({"bias": torch.zeros(5)}, TypeError, "bias: expected float64, got float32"),
        ({"running_var": torch.zeros(5).half()}, TypeError, "running_var: expected float64, got float16"),
        ({"running_mean": torch.zeros(5, device="meta").double()}, ValueError, "running_mean: expected device cpu"),
        ({"num_batches_tracked": torch.zeros(1).long()}, ValueError, r"num_batches_tracked: expected shape \(\)"),
        ({"num_batches_tracked": torch.zeros(())}, TypeError, "num_batches_tracked: expected int64, got float32"),
        ({"training": False, "running_var": None}, ValueError, "running_var: expected a tensor .*, got None"),
        ({"momentum": 2.0}, ValueError, r"momentum: expected a number in \[0, 1\] or None, got 2.0"),
        ({"eps": 0.0}, ValueError, "eps: expected a positive number, got 0.0"),
        ({"processes": 0}, ValueError, "processes: expected at least 1, got 0"),
        ({"x": torch.zeros(1, 5, 1, 1).double()}, ValueError, "more than 1 value per channel when training"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(change, error, message):
    names = ("x", "weight", "bias", "running_mean", "running_var")
    given = {**dict(zip(names, arguments(), strict=True)), **change}
    with pytest.raises(error, match=message):
        batch_norm_relu(**given)


def test_traces_into_one_graph():
    x, weight, bias, mean, var = (value.float() for value in arguments())
    results = []
    for function in (batch_norm_relu, torch.compile(batch_norm_relu, fullgraph=True, backend="aot_eager")):
        leaf, running = x.clone().requires_grad_(), (mean.clone(), var.clone(), torch.tensor(0))
        y = function(leaf, weight, bias, *running)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *running])
    for traced, plain in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)


def test_activations_are_accessed_16_bytes_at_a_time_and_never_ahead():
    """In the machine code for sm_90. An asynchronous copy (LDGSTS) would ignore the mask of its address."""
    code = (
        "import json\n"
        "from vglann_kernels import resources\n"
        "from vglann_kernels.configurations import configurations\n"
        "if __name__ == '__main__':\n"
        "    found = [c for c in configurations(90) if c.op == 'batchnorm_relu']\n"
        "    code = [resources.disassembly(resources.compile_kernel(c, 90).asm['cubin']) for c in found]\n"
        "    print(json.dumps(dict(zip([c.name for c in found], code))))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) == 6
    for name, opcodes in kernels.items():
        assert "LDG.E.128" in opcodes, name
        assert not any(opcode.startswith("LDGSTS") for opcode in opcodes), name
        # 2-byte accesses would be of single bfloat16 values.
        assert not any(opcode.startswith(("LDG.E.U16", "STG.E.U16")) for opcode in opcodes), name
        assert ("STG.E.128" in opcodes) == name.startswith(("forward", "backward")), name


def test_the_backward_pass_compiles_for_any_number_of_parts():
    """256 channels have 33 parts on a GPU of 132 multiprocessors, and a tile of another number of rows."""
    code = (
        "from dataclasses import replace\n"
        "from vglann_kernels import resources\n"
        "from vglann_kernels.configurations import configurations\n"
        "(c,) = [c for c in configurations(90) if c.name == 'backward bf16 64 channels']\n"
        "resources.compile_kernel(replace(c, constants={**c.constants, 'PARTS': 64}), 90)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
