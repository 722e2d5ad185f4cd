"""`mask_composite`: eager, compiled, Triton; both layouts; forward, and forward with backward."""

import sys
from pathlib import Path

import pytest
import torch
from vglann_kernels import mask_composite

sys.path.insert(0, str(Path(__file__).parent))  # this file is a pytest module: it does not find its neighbour
from interleaved import DEVICE, SHAPES, agree, record


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("mode", ["fwd", "full"])
def test_composite(benchmark, shape, last, mode):
    batch, frames, size = shape
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    head = torch.randn(batch, 4, frames, size, size, device=DEVICE, dtype=dtype)
    background = torch.randn(batch, 3, size, size, device=DEVICE, dtype=dtype)
    if last:
        head = head.to(memory_format=torch.channels_last_3d)
        background = background.to(memory_format=torch.channels_last)
    inputs = [x.requires_grad_(mode == "full") for x in (head, background)]
    upstream = torch.randn_like(head[:, :3])
    videos = {
        "reference": lambda: mask_composite(*inputs, impl="reference")[0],
        "triton": lambda: mask_composite(*inputs, impl="triton")[0],
    }
    if DEVICE == "cuda":
        videos["compile"] = torch.compile(videos["reference"])
    agree(videos, 1e-2)

    def full(video):
        return lambda: torch.autograd.grad(video(), inputs, upstream)

    calls = {name: full(video) if mode == "full" else video for name, video in videos.items()}
    once = head.numel() + background.numel()
    values = once + upstream.numel() + (2 * once + upstream.numel() if mode == "full" else 0)
    record(benchmark, calls, values * head.element_size())
