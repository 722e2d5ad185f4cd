"""Measure what an eager call of each op costs the host, in units of one addition of two small tensors.

    python bench/op_overhead.py [--rounds 200]

prints, per op, the median over rounds of (forward and backward pass, or step) / (one `torch.add`), the two timed in
turns. Kernels are replaced by nothing: this is the cost of checks, dispatch, autograd and the launchers' own Python,
without the launches themselves. Needs triton, but no GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from vglann_kernels import (
    batch_norm_relu,
    composite_laplacian_loss,
    guard_step,
    laplacian_pyramid_loss,
    latent_adam_state,
    latent_adam_step,
    latent_gather,
    mask_composite,
    upsample_convolution,
)
from vglann_kernels import impl as switch

CALLS = 20


class NoKernel:
    """Takes the place of a kernel: a launch does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: None


def without_kernels() -> None:
    """Let CPU tensors take the Triton path, and make its launches do nothing."""
    import triton
    from vglann_kernels.batchnorm_relu import kernel as batchnorm_relu
    from vglann_kernels.composite import kernel as composite
    from vglann_kernels.composite_laplacian import kernel as composite_laplacian
    from vglann_kernels.laplacian import kernel as laplacian
    from vglann_kernels.latent_adam import kernel as latent_adam
    from vglann_kernels.step_guard import kernel as step_guard
    from vglann_kernels.upsample_conv import kernel as upsample_conv
    from vglann_kernels.upsample_conv import weight_gradient

    modules = (composite, laplacian, composite_laplacian, latent_adam, batchnorm_relu, step_guard)
    for module in (*modules, upsample_conv, weight_gradient):
        for name, value in vars(module).copy().items():
            if name.endswith("_kernel") and isinstance(value, triton.JITFunction):
                setattr(module, name, NoKernel())
    for op in switch.OPS:
        switch.implementations(op)["triton"] = lambda device: None
    switch.use_impl("triton")


def calls() -> dict[str, Callable[[], Any]]:
    """Return a call of each op at a tiny shape, with the backward pass where there is one."""
    head = torch.randn(2, 4, 2, 32, 32, requires_grad=True)
    background = torch.randn(2, 3, 32, 32, requires_grad=True)
    clips = torch.randint(0, 256, (4, 3, 2, 32, 32), dtype=torch.uint8)
    index, one = torch.tensor([0, 1]), torch.ones(())
    target, video = clips[index], torch.randn(2, 3, 2, 32, 32, requires_grad=True)
    table, lr, skip = torch.randn(10, 8), torch.tensor(0.1), torch.tensor(False)
    state, grad = latent_adam_state(table), torch.randn(2, 8)

    x, weight, bias = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last), *torch.ones(2, 8)
    statistics, counter = list(torch.ones(2, 8)), torch.tensor(0)
    flags = {name: torch.tensor(False) for name in ("frozen", "mine", "skip")}
    guard = {**flags, "step": counter, "rows": index.clone(), "found_inf": torch.tensor(0.0)}

    def norm() -> None:
        leaf = x.requires_grad_()
        torch.autograd.grad(batch_norm_relu(leaf, weight, bias, *statistics, counter), leaf, x.detach())

    kernel = torch.randn(8, 4, 4, 4, requires_grad=True)

    def convolution() -> None:
        y = upsample_convolution(x.requires_grad_(), kernel)
        torch.autograd.grad(y, (x, kernel), torch.empty_like(y))

    def composite() -> None:
        outputs = mask_composite(head, background)
        torch.autograd.grad(outputs[0], (head, background), torch.empty_like(outputs[0]))

    def joint() -> None:
        torch.autograd.grad(composite_laplacian_loss(head, background, clips, index), (head, background), one)

    return {
        "composite": composite,
        "laplacian": lambda: torch.autograd.grad(laplacian_pyramid_loss(video, target), video, one),
        "composite_laplacian": joint,
        "batch_norm_relu": norm,
        "upsample_convolution": convolution,
        "guard_step": lambda: guard_step(one, one, index, **guard),
        "latent_gather": lambda: latent_gather(table, state, index),
        "latent_adam_step": lambda: latent_adam_step(
            table, state, index, grad, lr=lr, retraction="sphere", skip=skip
        ),
    }


def seconds(call: Callable[[], Any]) -> float:
    """Return the time of CALLS calls."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="default 200")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    without_kernels()
    x = torch.ones(4)
    add = lambda: torch.add(x, x)  # noqa: E731
    print("in units of one torch.add")
    for name, call in calls().items():
        seconds(call), seconds(add)
        ratios = [seconds(call) / seconds(add) for _ in range(rounds)]
        print(f"{name:20} {statistics.median(ratios):6.1f}")


if __name__ == "__main__":
    main()
