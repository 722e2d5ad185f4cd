"""`mask_composite`: eager, compiled, Triton; both layouts; forward, backward, both."""

import pytest
import torch
from vglann_kernels import mask_composite

from vglann_fast.experiments.timing import DEVICE, DTYPE, LAYOUTS, MODES, SHAPES, Group, compiled, in_mode


def group(shape, layout, mode):
    """The contenders on logits of `shape` (videos, frames, size)."""
    batch, frames, size = shape
    torch.manual_seed(0)
    head = torch.randn(batch, 4, frames, size, size, device=DEVICE, dtype=DTYPE)
    background = torch.randn(batch, 3, size, size, device=DEVICE, dtype=DTYPE)
    if LAYOUTS[layout]:
        head = head.to(memory_format=torch.channels_last_3d)
        background = background.to(memory_format=torch.channels_last)
    inputs = [x.requires_grad_(mode != "fwd") for x in (head, background)]
    upstream = torch.randn_like(head[:, :3])

    def video(impl):
        return lambda: mask_composite(*inputs, impl=impl)[0]

    forwards = {name: video(name) for name in ("reference", "triton")}
    forwards["compile"] = compiled(video("reference"))
    calls = {name: in_mode(mode, forward, inputs, upstream) for name, forward in forwards.items()}
    once = head.numel() + background.numel()
    values = {"fwd": once + upstream.numel(), "bwd": 2 * once + upstream.numel()}
    values["full"] = values["fwd"] + values["bwd"]
    return Group(calls, 1e-2, values[mode] * head.element_size())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_composite(benchmark, timing, shape, layout, mode):
    timing.record(benchmark, group(shape, layout, mode))
