"""`laplacian_pyramid_loss`: the author's loop over frames, eager, compiled, Triton; both layouts of the video.

The kernel makes its gradient in the forward; "bwd" of it is the scaling by the upstream gradient.
"""

import pytest
import torch
import torch.nn.functional as F
from vglann_kernels import laplacian_pyramid_loss

from vglann_fast.experiments.timing import DEVICE, DTYPE, LAYOUTS, MODES, SHAPES, Group, compiled, in_mode

LEVELS = 3


def per_frame_loop(video, target, kernel):
    """The loss as the paper's code computes it: a loop over frames, two pyramids, padded convolutions."""

    def pyramid(image):
        for _ in range(LEVELS):
            low = F.conv2d(F.pad(image, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
            yield image - low
            image = F.avg_pool2d(low, 2)
        yield image

    total = 0
    for t in range(video.shape[2]):
        real = target[:, :, t].float() / 127.5 - 1
        levels = zip(pyramid(video[:, :, t].float()), pyramid(real), strict=True)
        total = total + sum(F.l1_loss(a, b) for a, b in levels)
    return total / video.shape[2]


def group(shape, layout, mode):
    """The contenders on a video `shape` (videos, frames, size)."""
    batch, frames, size = shape
    torch.manual_seed(0)
    video = torch.randn(batch, 3, frames, size, size, device=DEVICE).tanh().to(DTYPE)
    if LAYOUTS[layout]:
        video = video.to(memory_format=torch.channels_last_3d)
    video.requires_grad_(mode != "fwd")
    target = torch.randint(0, 256, video.shape, dtype=torch.uint8, device=DEVICE)
    taps = torch.tensor([1.0, 4, 6, 4, 1], device=DEVICE) / 16
    kernel = (taps[:, None] * taps).expand(3, 1, 5, 5)

    def loss(impl):
        return lambda: laplacian_pyramid_loss(video, target, levels=LEVELS, impl=impl)

    forwards = {name: loss(name) for name in ("reference", "triton")}
    forwards["compile"] = compiled(loss("reference"))
    forwards["author"] = lambda: per_frame_loop(video, target, kernel)
    one = torch.ones((), device=DEVICE)
    calls = {name: in_mode(mode, forward, [video], one) for name, forward in forwards.items()}
    pixels, gradient = video.numel(), video.numel() * video.element_size()
    floor = {"fwd": gradient + pixels, "bwd": 2 * gradient, "full": 2 * gradient + pixels}
    # two-sided products with the band matrices, as the kernel does them: forward, and adjoint for the gradient
    products = sum(4 * (size >> level) ** 3 for level in range(LEVELS)) * pixels // size**2
    flops = {"fwd": products, "bwd": 0, "full": 2 * products}
    return Group(calls, 1e-4 if mode == "fwd" else 1e-2, floor[mode], flops[mode])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_laplacian(benchmark, timing, shape, layout, mode):
    timing.record(benchmark, group(shape, layout, mode))
