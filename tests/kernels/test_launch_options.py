"""Every launch says whether multiply-adds are fused: Triton's default differs between versions."""

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from vglann_kernels.batchnorm_relu import kernel as batchnorm_relu
from vglann_kernels.composite import kernel as composite
from vglann_kernels.composite_laplacian import kernel as composite_laplacian
from vglann_kernels.laplacian import kernel as laplacian
from vglann_kernels.laplacian.pyramid import Pyramid
from vglann_kernels.latent_adam import kernel as latent_adam
from vglann_kernels.launch import LAUNCH
from vglann_kernels.nearest import kernel as nearest
from vglann_kernels.step_guard import kernel as step_guard
from vglann_kernels.upsample_conv import kernel as upsample_conv
from vglann_kernels.upsample_conv import weight_gradient as upsample_conv_weights

MODULES = (composite, laplacian, composite_laplacian, latent_adam, nearest, batchnorm_relu, step_guard)
MODULES += (upsample_conv, upsample_conv_weights)


class Recorder:
    """Takes the place of a kernel and notes the options of its launches."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((self.name, options))


@pytest.fixture
def launches(monkeypatch):
    recorded = []
    for module in MODULES:
        for name, value in vars(module).copy().items():
            if name.endswith("_kernel") and hasattr(value, "arg_names"):
                monkeypatch.setattr(module, name, Recorder(name, recorded))
    return recorded


def launch_everything():
    head, background = torch.randn(2, 4, 2, 32, 32), torch.randn(2, 3, 32, 32)
    video, mask = torch.randn(2, 3, 2, 32, 32), torch.randn(2)
    composite.composite_fwd(head, background)
    composite.composite_bwd(head, background, video, mask)
    options = Pyramid.checked((32, 32), 2, "binomial", 2.0, None, (-1, 1), "mean", 0, 0)
    laplacian.laplacian_fwd(video, video, options, 1.0, True)
    laplacian.scale_gradients([video], torch.ones(()), 2.0)
    clips, index = torch.zeros(3, 3, 2, 32, 32, dtype=torch.uint8), torch.tensor([0, 2])
    composite_laplacian.composite_laplacian_fwd(
        head, background, clips, index, 2, 0.0, options, 1.0, True, False
    )
    table, row_step, step, arrived = (
        torch.randn(5, 3),
        torch.zeros(5).long(),
        torch.tensor(0),
        torch.tensor(0),
    )
    moments, lr, rates = (table, table), torch.tensor(0.1), ((0.5, 0.999), 1e-8)
    latent_adam.gather(table, moments, (row_step, step), index, lr, *rates, True)
    for mode in ("sparse", "dense"):
        counters = (row_step, step, arrived)
        latent_adam.step(table, moments, counters, index, table[:2], lr, *rates, mode, None, None)
    latent_adam.flush(table, moments, (row_step, step), lr, *rates)
    rows, offset = torch.randn(256, 8), torch.zeros(8).double()
    scan = {"QUERIES": 256, "num_warps": 8, "num_stages": 3}
    for parts in (1, 2):
        packed = nearest.Packed(rows, offset, 0, parts, 256, False)
        maxima = nearest.scan(packed, packed, parts, scan)
    slots, count = nearest.select(maxima, packed, packed, 16)
    nearest.decide(rows, rows, slots, count)
    x, vector = torch.randn(2, 5, 3, 3).contiguous(memory_format=torch.channels_last), torch.ones(5)
    batchnorm_relu.forward(x, *[vector] * 2, batchnorm_relu.statistics(x), *[None] * 3, 1, True, 0.1, 1e-5)
    saved = (x, x, *[vector] * 4)
    batchnorm_relu.backward(*saved, batchnorm_relu.gradient_sums(*saved), 1, True)
    weight, upstream = torch.randn(5, 2, 4, 4), torch.randn(2, 2, 6, 6)
    upsample_conv.forward(x, weight, None, None, None, True)
    upsample_conv.input_gradient(upstream, weight, x, None, None)
    upsample_conv_weights.weight_gradient(upstream, weight, x, None, None, True)
    flag, number = torch.tensor(False), torch.tensor(0.0)
    step_guard.guard(number, number, index, None, flag, flag, step, index, flag, number, None, None)


def test_every_launch_fuses_multiply_adds(launches):
    kernels = {
        name for module in MODULES for name, value in vars(module).items() if isinstance(value, Recorder)
    }
    launch_everything()
    assert {name for name, _ in launches} == kernels
    for name, options in launches:
        assert options.get("enable_fp_fusion") is True, name


class TensorWork(TorchDispatchMode):
    """Notes every operation of PyTorch's own that is a launch: allocations and views are none."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name()
        if not operation.is_view and not name.startswith(("aten::empty", "aten::new_empty")):
            self.names.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(("reduction", "count"), [("mean", 2), ("sum", 2), ("none", 1)])
def test_the_joint_loss_is_two_launches_with_its_sums(launches, reduction, count):
    head, background = torch.randn(2, 4, 2, 32, 32), torch.randn(2, 3, 32, 32)
    clips, index = torch.zeros(3, 3, 2, 32, 32, dtype=torch.uint8), torch.tensor([0, 2])
    options = Pyramid.checked((32, 32), 2, "binomial", 2.0, None, (-1, 1), reduction, 0.5, 0)
    with TensorWork() as work:
        composite_laplacian.composite_laplacian_fwd(
            head, background, clips, index, 2, 0.0, options, 1.0, reduction != "none", True
        )
    assert work.names == []
    assert len(launches) == count


def test_a_launch_of_a_backward_pass_is_its_kernels_alone(launches):
    planes = (torch.randn(2, 4, 2, 32, 32), torch.randn(2, 3, 32, 32), torch.randn(2, 3, 2, 32, 32))
    x, vector = torch.randn(2, 5, 3, 3).contiguous(memory_format=torch.channels_last), torch.ones(5)
    weight = torch.randn(5, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    one, mask, upstream = torch.ones(()), torch.randn(2), x.new_empty(2, 2, 6, 6)
    with TensorWork() as work:
        composite.composite_bwd(*planes, mask)
        laplacian.scale_gradients([planes[2]], one, 2.0)
        saved = (x, x, *[vector] * 4)
        for sums in (None, batchnorm_relu.gradient_sums(*saved)):
            batchnorm_relu.backward(*saved, sums, 1, True)
        upsample_conv.input_gradient(upstream, weight, x, vector, vector)
        upsample_conv_weights.weight_gradient(upstream, weight, x, vector, vector, True)
    assert len(launches) == 9
    assert work.names == []


def test_triton_knows_the_option():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    options = make_backend(GPUTarget("cuda", 90, 32)).parse_options(dict(LAUNCH))
    assert options.enable_fp_fusion is True, triton.__version__
