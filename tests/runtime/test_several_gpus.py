"""A host with several GPUs: one line says how a training uses all of them."""

import logging

import pytest
import torch

from vglann_fast.runtime.distributed import Ranks, suggest_all_gpus


@pytest.mark.parametrize(
    ("device", "ranks", "gpus", "said"),
    [
        ("cuda", Ranks(), 4, True),
        ("cuda", Ranks(), 1, False),
        ("cuda:1", Ranks(), 4, False),
        ("cuda", Ranks(0, 4), 4, False),
        ("cpu", Ranks(), 4, False),
    ],
)
def test_the_line_is_for_a_training_that_leaves_gpus_idle(monkeypatch, caplog, device, ranks, gpus, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    caplog.set_level(logging.INFO, "vglann_fast")
    suggest_all_gpus(torch.device(device), ranks)
    assert ("torchrun --nproc-per-node 4" in caplog.text) == said
