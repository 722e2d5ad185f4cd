"""A step of the latents: dense Adam with embedding gradient and renormalization, and our three modes."""

import pytest
import torch
from vglann_kernels import latent_adam_state, latent_adam_step

from vglann_fast.experiments.timing import DEVICE, Group

ROWS = 50_000 if DEVICE == "cuda" else 5_000


def group(batch, mode):
    """The contenders on a table of ROWS latents. Dense Adam computes something else, so it is not compared."""
    torch.manual_seed(0)
    table = torch.nn.functional.normalize(torch.randn(ROWS, 100, device=DEVICE))
    index, grad = torch.randint(0, ROWS, (batch,), device=DEVICE), torch.randn(batch, 100, device=DEVICE)
    embedding = torch.nn.Parameter(table.clone())
    optimizer = torch.optim.Adam(
        [embedding], lr=0.01, betas=(0.5, 0.999), fused=True, capturable=DEVICE == "cuda"
    )
    lr = torch.tensor(0.01, device=DEVICE)

    def torch_adam():
        embedding.grad = torch.zeros_like(embedding).index_add_(0, index, grad)
        optimizer.step()
        with torch.no_grad():
            embedding.div_(embedding.norm(dim=1, keepdim=True))

    def step(impl):
        latents, retraction = table.clone(), "sphere" if mode == "sparse" else None
        state = latent_adam_state(latents, mode)

        def call():
            latent_adam_step(latents, state, index, grad, lr=lr, retraction=retraction, impl=impl)
            return latents

        return call

    steps = {"reference": step("reference"), "triton": step("triton"), "torch fused Adam": torch_adam}
    calls = {name: lambda call=call: call for name, call in steps.items()}
    return Group(calls, 1e-5, 28 * grad.numel() if mode != "dense" else 24 * table.numel())


@pytest.mark.parametrize("batch", [15, 256])
@pytest.mark.parametrize("mode", ["sparse", "lazy", "dense"])
def test_latent_adam(benchmark, timing, batch, mode):
    timing.record(benchmark, group(batch, mode))
