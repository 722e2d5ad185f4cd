"""`laplacian_pyramid_loss`: the author's loop over frames, eager, compiled, Triton; forward with backward."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from vglann_kernels import laplacian_pyramid_loss

sys.path.insert(0, str(Path(__file__).parent))  # this file is a pytest module: it does not find its neighbour
from interleaved import DEVICE, SHAPES, agree, record


def per_frame_loop(video, target):
    """The loss as the paper's code computes it: a loop over frames, two pyramids, padded convolutions."""
    taps = torch.tensor([1.0, 4, 6, 4, 1], device=video.device) / 16
    kernel = (taps[:, None] * taps).expand(3, 1, 5, 5)

    def pyramid(image):
        for _ in range(3):
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["fwd", "full"])
def test_laplacian(benchmark, shape, mode):
    batch, frames, size = shape
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    video = (
        torch.randn(batch, 3, frames, size, size, device=DEVICE)
        .tanh()
        .to(dtype)
        .requires_grad_(mode == "full")
    )
    target = torch.randint(0, 256, video.shape, dtype=torch.uint8, device=DEVICE)
    compiled = torch.compile(lambda: laplacian_pyramid_loss(video, target, impl="reference"))
    losses = {
        "author": lambda: per_frame_loop(video, target),
        "reference": lambda: laplacian_pyramid_loss(video, target, impl="reference"),
        "triton": lambda: laplacian_pyramid_loss(video, target, impl="triton"),
    }
    if DEVICE == "cuda":
        losses["compile"] = compiled
    agree(losses, 1e-4)

    def full(loss):
        return lambda: torch.autograd.grad(loss(), video)

    calls = {name: full(loss) if mode == "full" else loss for name, loss in losses.items()}
    bytes_each = video.element_size() * (2 if mode == "full" else 1) + 1
    record(benchmark, calls, video.numel() * bytes_each)
