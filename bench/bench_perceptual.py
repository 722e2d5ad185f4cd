"""Losses by the features of a network, and the gradient of the video: the clips' features computed at each call
or kept, float32 or bfloat16.

The weights are the user's where imported, else random numbers; the row "weights" says which. Time does not depend
on them.
"""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vglann_fast.errors import VglannError
from vglann_fast.experiments.timing import DEVICE, SHAPES, Group, disagreements
from vglann_fast.glo.loader import Batch
from vglann_fast.glo.perceptual import FeatureLoss
from vglann_fast.nets.efficientnet_lite0 import EfficientNetLite0
from vglann_fast.nets.resnet3d import ResNet3d
from vglann_fast.nets.vgg16 import VGG16
from vglann_fast.nets.weights import Weights, load_weights
from vglann_fast.options.training import PERCEPTUAL, TrainOptions

KEPT = {"kept": True, "computed": False}


class Given:
    """A source of clips that has all of them."""

    name = "resident"

    def __init__(self, clips):
        self.clips = clips

    def batch(self, rows, following=None):
        rows = torch.from_numpy(rows).to(DEVICE)
        return Batch(self.clips, rows, rows)

    def close(self):
        pass


def weights_of(name):
    """(weights, where they come from)."""
    try:
        return load_weights(name), "imported"
    except VglannError:
        torch.manual_seed(0)
        made = {"lite0": EfficientNetLite0, "vgg16": VGG16, "hed-vgg16": VGG16}
        network = made[name]() if name in made else ResNet3d(name)
        return Weights(name, network.state_dict(), "0" * 64), "random"


@pytest.mark.parametrize("shape", SHAPES[:1], ids=str)
@pytest.mark.parametrize("name", PERCEPTUAL)
def test_perceptual(benchmark, timing, name, shape):
    batch, frames, size = shape
    torch.manual_seed(0)
    weights, origin = weights_of(name)
    clips = torch.randint(0, 256, (batch, 3, frames, size, size), dtype=torch.uint8, device=DEVICE)
    video = torch.randn(clips.shape, device=DEVICE).tanh().requires_grad_()
    rows = torch.arange(batch, device=DEVICE)
    options = TrainOptions(loss=name, cache_features="on")
    losses = {p: FeatureLoss(weights, options, torch.device(DEVICE), p) for p in ("fp32", "bf16")}
    for loss in losses.values():
        loss.keep_targets(Given(clips), batch, batch)

    def contender(loss, kept):
        def call():
            return torch.autograd.grad(loss.against(clips, rows if kept else None)(video), video)

        return lambda: call

    calls = {
        f"{precision} {how}": contender(loss, kept)
        for precision, loss in losses.items()
        for how, kept in KEPT.items()
    }
    for precision in losses:
        alike = {name: call for name, call in calls.items() if name.startswith(precision)}
        assert not disagreements(Group(alike, 1e-5, 1))
    with FlopCounterMode(display=False) as counted:
        calls["fp32 kept"]()()
    moved = clips.numel() + 2 * video.numel() * video.element_size()
    benchmark.extra_info["weights"] = origin
    timing.record(benchmark, Group(calls, math.inf, moved, counted.get_total_flops()))
