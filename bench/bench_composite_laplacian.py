"""`composite_laplacian_loss` with its gradients: eager, the two kernels in turn, the joined kernel."""

import sys
from pathlib import Path

import pytest
import torch
from vglann_kernels import composite_laplacian_loss, laplacian_pyramid_loss, mask_composite

sys.path.insert(0, str(Path(__file__).parent))  # this file is a pytest module: it does not find its neighbour
from interleaved import DEVICE, SHAPES, agree, record


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blur", ["binomial", "seed"])
def test_composite_laplacian(benchmark, shape, blur):
    batch, frames, size = shape
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    head = torch.randn(batch, 4, frames, size, size, device=DEVICE, dtype=dtype)
    head = head.to(memory_format=torch.channels_last_3d).requires_grad_()
    background = torch.randn(batch, 3, size, size, device=DEVICE, dtype=dtype, requires_grad=True)
    clips = torch.randint(0, 256, (batch + 8, 3, frames, size, size), dtype=torch.uint8, device=DEVICE)
    index = torch.randperm(batch + 8, device=DEVICE)[:batch]

    def two_kernels():
        video = mask_composite(head, background, impl="triton")[0]
        return laplacian_pyramid_loss(video, clips[index], blur=blur, impl="triton")

    losses = {
        "reference": lambda: composite_laplacian_loss(
            head, background, clips, index, blur=blur, impl="reference"
        ),
        "two kernels": two_kernels,
        "triton": lambda: composite_laplacian_loss(head, background, clips, index, blur=blur, impl="triton"),
    }
    if DEVICE == "cuda":
        losses["compile"] = torch.compile(losses["reference"])
    agree(losses, 1e-2)
    calls = {
        name: lambda loss=loss: torch.autograd.grad(loss(), (head, background))
        for name, loss in losses.items()
    }
    floor = 2 * (head.numel() + background.numel()) * head.element_size() + batch * clips[0].numel()
    record(benchmark, calls, floor)
