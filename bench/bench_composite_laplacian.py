"""`composite_laplacian_loss`: eager, compiled, the two kernels in turn, the joined kernel.

The joined kernel makes its gradients in the forward; "bwd" of it is the scaling by the upstream gradient.
"""

import pytest
import torch
from vglann_kernels import composite_laplacian_loss, laplacian_pyramid_loss, mask_composite

from vglann_fast.experiments.timing import DEVICE, DTYPE, LAYOUTS, MODES, SHAPES, Group, compiled, in_mode

CASES = [("binomial", layout, mode) for layout in LAYOUTS for mode in MODES]


def group(shape, layout, mode, blur="binomial"):
    """The contenders on logits of `shape` (videos, frames, size)."""
    batch, frames, size = shape
    torch.manual_seed(0)
    head = torch.randn(batch, 4, frames, size, size, device=DEVICE, dtype=DTYPE)
    background = torch.randn(batch, 3, size, size, device=DEVICE, dtype=DTYPE)
    if LAYOUTS[layout]:
        head = head.to(memory_format=torch.channels_last_3d)
        background = background.to(memory_format=torch.channels_last)
    inputs = [x.requires_grad_(mode != "fwd") for x in (head, background)]
    clips = torch.randint(0, 256, (batch + 8, 3, frames, size, size), dtype=torch.uint8, device=DEVICE)
    index = torch.randperm(batch + 8, device=DEVICE)[:batch]

    def joined(impl):
        return lambda: composite_laplacian_loss(*inputs, clips, index, blur=blur, impl=impl)

    def two_kernels():
        video = mask_composite(*inputs, impl="triton")[0]
        return laplacian_pyramid_loss(video, clips[index], blur=blur, impl="triton")

    forwards = {"reference": joined("reference"), "two kernels": two_kernels, "triton": joined("triton")}
    forwards["compile"] = compiled(joined("reference"))
    one = torch.ones((), device=DEVICE)
    calls = {name: in_mode(mode, forward, inputs, one) for name, forward in forwards.items()}
    logits = (head.numel() + background.numel()) * head.element_size()
    pixels = batch * clips[0].numel()
    floor = {"fwd": logits + pixels, "bwd": 2 * logits, "full": 2 * logits + pixels}
    # the video between the two ops is rounded to bfloat16, which turns signs of the L1 gradient
    return Group(calls, 1e-2 if mode == "fwd" else 1e-1, floor[mode])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("blur", "layout", "mode"), [*CASES, ("paper", "channels-last", "full")])
def test_composite_laplacian(benchmark, timing, shape, blur, layout, mode):
    timing.record(benchmark, group(shape, layout, mode, blur))
