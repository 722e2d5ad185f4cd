"""Launches of one whole training step, counted without a GPU.

The step runs on the device "meta" with bfloat16, kernels and Adam, at the size of the presets. Counted are PyTorch's
operations that are neither views nor allocations, and launches of Triton kernels where the launchers make them. A
convolution's backward pass counts once, although cuDNN launches several kernels for it.
"""

from collections import Counter
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from on_meta import patch_for_meta
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from vglann_kernels import impl as switch

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo import assemble
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.loader import Batch
from vglann_fast.glo.precision import AUTOCAST
from vglann_fast.options.presets import PRESETS
from vglann_fast.run.folder import RunDir

# Launchers see the tensors themselves; the fake implementations would not show their launches.
LAUNCHERS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
# No kernel runs for them.
FREE = (
    "detach",
    "alias",
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
)


# What autocast computes in half precision, of what the generator calls.
IN_HALF = {F.linear, torch.conv2d, torch.conv3d, torch.conv_transpose2d, torch.conv_transpose3d}


class CastAsAutocast(TorchFunctionMode):
    """Casts what goes into products, as autocast without its cache does; meta tensors have no autocast."""

    def __init__(self, half):
        super().__init__()
        self.half = half

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in IN_HALF:
            args = [
                arg.to(self.half) if isinstance(arg, torch.Tensor) and arg.dtype == torch.float32 else arg
                for arg in args
            ]
        return function(*args, **(kwargs or {}))


def in_precision(logits, precision, device):
    """Stands in for `glo.precision.in_precision`."""

    def cast(z):
        with CastAsAutocast(AUTOCAST[precision]):
            return logits(z)

    return cast


class Counted(TorchDispatchMode):
    """Counts launches by name."""

    def __init__(self):
        super().__init__()
        self.launches = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "vglann_kernels":
            with self:
                return operation.redispatch(LAUNCHERS, *args, **(kwargs or {}))
        name = operation.name().removeprefix("aten::").partition(".")[0]
        if operation.namespace == "aten" and not operation.is_view and name not in FREE:
            self.launches[name] += 1
        result = operation(*args, **(kwargs or {}))
        # cuDNN gives channels-last results for channels-last inputs; the device "meta" does so for images only.
        return tree_map_only(torch.Tensor, channels_last, result) if operation in CONVOLUTIONS else result


def channels_last(x):
    if x.ndim < 4:
        return x
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


class Kernel:
    """Takes the place of a Triton kernel and counts its launches."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.update([self.name])


@pytest.fixture
def launches_of(monkeypatch, tmp_path):
    """A function: changes of the options -> launches of one step by name."""
    count = Counted()
    patch_for_meta(monkeypatch, lambda: count.launches.update(["fused_adam"]))
    monkeypatch.setattr(assemble, "in_precision", in_precision)
    for place in (*(f"{op}.kernel" for op in switch.OPS), "upsample_conv.weight_gradient"):
        module, op = import_module(f"vglann_kernels.{place}"), place.partition(".")[0]
        for name, value in vars(module).copy().items():
            if name.endswith("_kernel") and hasattr(value, "arg_names"):
                monkeypatch.setattr(module, name, Kernel(f"{op} {name}", count.launches))
    clips = ClipSet.open(write_clip_folder(tmp_path / "clips", moving_squares(16, 32, 64)), "train")

    def launches(kernels="triton,upsample_conv=reference", **changes):
        options = replace(PRESETS["modern-2026a"].train, data="resident", precision="bf16", **changes)
        with switch.using_impl(kernels):
            training = new_training(clips, options, RunDir(clips.folder, {}), device="meta")
            training.begin_epoch(0)
            rows = torch.zeros(training.batch_size, dtype=torch.int64, device="meta")
            for _ in range(2):  # what the first step makes and keeps is not counted
                count.launches.clear()
                with count:
                    training.update([Batch(training.source.table, rows, rows)], False)
        return Counter(count.launches)

    return launches


def test_a_step_is_at_most_95_launches(launches_of):
    launches = launches_of()
    assert launches.total() <= 95, launches
    assert launches["fused_adam"] == launches["step_guard _guard_kernel"] == 1
    # Each way two launches for the three large layers and one for the five small ones.
    norms = {name: n for name, n in launches.items() if name.startswith("batchnorm_relu")}
    assert sum(norms.values()) == 2 * (2 * 3 + 5)
    assert launches["convolution"] == launches["convolution_backward"] == 8


def test_convolutions_by_the_kernel_are_four_launches_a_layer(launches_of, monkeypatch):
    """Forward, by the input, and two by the weights; of a head's bias the sums are added up."""
    launches = launches_of("triton")
    for kernel in ("forward", "input_gradient", "weight_gradient", "sum"):
        assert launches[f"upsample_conv _{kernel}_kernel"] == 8, launches
    assert "convolution" not in launches
    assert launches.total() <= 115, launches
    # Chosen for two layers, as after `vglann tune`.
    monkeypatch.setitem(switch.implementations("upsample_conv"), "triton", lambda device: None)
    with switch.preferring({f"upsample_conv {layer}": "triton" for layer in ("3d 128-64", "2d 64-3")}):
        launches = launches_of("triton,upsample_conv=auto")
    assert (launches["upsample_conv _forward_kernel"], launches["convolution"]) == (2, 6)


def test_muon_is_counted_apart(launches_of):
    muon, adam = launches_of(optimizer="muon"), launches_of()
    assert 0 < muon.total() - adam.total() <= 280


def test_the_stand_in_casts_as_autocast_does():
    """On the CPU, which has an autocast: as many casts in both passes."""
    generator = TwoStreamGenerator("original", 8, 4, frames=16, size=16).channels_last()
    z = torch.randn(2, 8, requires_grad=True)
    casts = []
    for cast in (torch.autocast("cpu", torch.bfloat16, cache_enabled=False), CastAsAutocast(torch.bfloat16)):
        with Counted() as count:
            with cast:
                head, background = generator.logits(z)
            (head.float().sum() + background.float().sum()).backward()
        casts.append(count.launches["_to_copy"])
    assert casts[0] == casts[1] > 20
