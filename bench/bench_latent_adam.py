"""A step of the latents: dense Adam with embedding gradient and renormalisation, and our three modes."""

import sys
from pathlib import Path

import pytest
import torch
from vglann_kernels import latent_adam_state, latent_adam_step

sys.path.insert(0, str(Path(__file__).parent))  # this file is a pytest module: it does not find its neighbour
from interleaved import DEVICE, record

ROWS = 50_000 if DEVICE == "cuda" else 5_000


@pytest.mark.parametrize("batch", [15, 256])
@pytest.mark.parametrize("mode", ["row", "catchup", "dense"])
def test_latent_adam(benchmark, batch, mode):
    torch.manual_seed(0)
    table = torch.nn.functional.normalize(torch.randn(ROWS, 100, device=DEVICE))
    index, grad = torch.randint(0, ROWS, (batch,), device=DEVICE), torch.randn(batch, 100, device=DEVICE)
    embedding = torch.nn.Parameter(table.clone())
    optimiser = torch.optim.Adam([embedding], lr=0.01, betas=(0.5, 0.999), fused=True)
    lr = torch.tensor(0.01, device=DEVICE)

    def torch_adam():
        embedding.grad = torch.zeros_like(embedding).index_add_(0, index, grad)
        optimiser.step()
        with torch.no_grad():
            embedding.div_(embedding.norm(dim=1, keepdim=True))

    def step(impl):
        latents, retraction = table.clone(), "sphere" if mode == "row" else None
        state = latent_adam_state(latents, mode)
        return lambda: latent_adam_step(latents, state, index, grad, lr=lr, retraction=retraction, impl=impl)

    calls = {"torch fused Adam": torch_adam, "reference": step("reference"), "triton": step("triton")}
    record(benchmark, calls, 28 * grad.numel() if mode != "dense" else 24 * table.numel())
