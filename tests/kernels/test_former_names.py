"""Names of earlier versions are accepted by the ops without a warning, which would break full graphs."""

import warnings

import pytest
import torch
from vglann_kernels import (
    composite_laplacian_loss,
    laplacian_pyramid_loss,
    latent_adam_state,
    latent_adam_step,
    verify,
)
from vglann_kernels.latent_adam.state import LatentAdamState
from vglann_kernels.verify import Shapes


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_blur_of_the_paper_was_called_seed():
    torch.manual_seed(0)
    video, target = torch.randn(2, 3, 2, 8, 8)
    assert laplacian_pyramid_loss(video, target, blur="seed") == laplacian_pyramid_loss(
        video, target, blur="paper"
    )
    assert laplacian_pyramid_loss(video, target, blur="seed") != laplacian_pyramid_loss(video, target)
    head, background = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 3, 8, 8)
    clips, index = torch.randint(0, 256, (1, 3, 2, 8, 8), dtype=torch.uint8), torch.tensor([0])
    values = [
        composite_laplacian_loss(head, background, clips, index, blur=blur) for blur in ("seed", "paper")
    ]
    assert values[0] == values[1]
    lines = [
        [line.error for line in verify.laplacian(Shapes(1, 1, 32, blur=blur, device="cpu", impl="reference"))]
        for blur in ("seed", "paper")
        if torch.manual_seed(0)
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(("former", "mode"), [("row", "sparse"), ("catchup", "lazy"), ("dense", "dense")])
def test_the_modes_of_latents_were_called_row_and_catchup(former, mode):
    table = torch.zeros(3, 2)
    state = latent_adam_state(table, former)
    assert state.mode == mode
    fields = {"arrived": state.arrived, "step": state.step, **state.tensors()}
    assert LatentAdamState(mode=former, **fields).mode == mode
    latent_adam_step(table, state, torch.tensor([1]), torch.ones(1, 2), lr=torch.tensor(0.1), mode=former)
    assert table[1].all()
