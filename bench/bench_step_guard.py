"""`guard_step`: the guard of a training step, its flags and the settled statistics of a generator of width 64."""

import pytest
import torch
from vglann_kernels import guard_step

from vglann_fast.experiments.timing import DEVICE, Group

WORDS = 3856


def group(batch: int) -> Group:
    """The contenders on a step of `batch` rows that counts."""
    loss = torch.tensor(1.0, device=DEVICE)
    index = torch.arange(batch, device=DEVICE)

    def step(impl: str):
        flags = {name: torch.zeros_like(loss, dtype=torch.bool) for name in ("frozen", "mine", "skip")}
        words = torch.arange(WORDS, dtype=torch.int32, device=DEVICE)
        tensors = {
            **flags, "step": torch.zeros_like(index[0]), "rows": torch.zeros_like(index),
            "found_inf": torch.zeros_like(loss), "words": words, "kept": words.clone(),
        }  # fmt: skip

        def call():
            guard_step(loss, loss, index, **tensors, impl=impl)
            return tensors["kept"]

        return call

    calls = {impl: lambda impl=impl: step(impl) for impl in ("reference", "triton")}
    return Group(calls, 0.0, 8 * WORDS)


@pytest.mark.parametrize("batch", [15, 256])
def test_step_guard(benchmark, timing, batch):
    timing.record(benchmark, group(batch))
