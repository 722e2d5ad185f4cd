"""losses.py: the fused op computes the sum of losses that one op after the other does."""

import pytest
import torch
from tiny import tiny_options

from vglann_fast.clips.pixels import to_range
from vglann_fast.experiments.moving_squares import moving_squares
from vglann_fast.glo import losses
from vglann_fast.glo.loader import Batch
from vglann_fast.glo.losses import glo_loss, reconstruction_loss
from vglann_fast.metrics.baselines import motion_sums

SUMS = ["laplacian", "laplacian:1,l2:2", "laplacian:0.5,l1:0.25", "l2:2,laplacian,l1:0.1"]


@pytest.mark.parametrize("frame_reduction", ["mean", "sum-but-last"])
@pytest.mark.parametrize("loss", SUMS)
def test_a_sum_with_a_pyramid_is_one_op_and_the_same_number(monkeypatch, loss, frame_reduction):
    options = tiny_options("modern", loss=loss, frame_reduction=frame_reduction, mask_weight=0.1)
    clips, rows = torch.from_numpy(moving_squares(4)), torch.tensor([2, 0])
    torch.manual_seed(0)
    shape = (2, 4, *clips.shape[2:])
    head, background = torch.randn(shape).double(), torch.randn(2, 3, *shape[3:]).double()
    logits = [tensor.requires_grad_() for tensor in (head, background)]
    apart, _ = glo_loss(
        *logits,
        Batch(to_range(clips, torch.float64, options.target_limits), rows, rows),
        options,
        with_video=False,
    )
    expected = [apart.detach(), *torch.autograd.grad(apart, logits)]
    # From here on only the fused op may compute.
    monkeypatch.setattr(losses, "reconstruction_loss", None)
    fused, _ = glo_loss(*logits, Batch(clips, rows, rows), options, with_video=False)
    found = [fused.detach(), *torch.autograd.grad(fused, logits)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_motion_loss_is_the_error_of_motion_r2():
    """Whatever the mean frame is: both leave it out."""
    options = tiny_options("modern", loss="motion:3")
    clips = torch.from_numpy(moving_squares(3))
    made = torch.from_numpy(moving_squares(5)[2:]).roll(1, 2)
    video = to_range(made, torch.float64, options.target_limits)
    sums = motion_sums(made, clips)
    expected = 3 * sums["motion_error"].sum() / clips.numel() * (2 / 255) ** 2
    assert reconstruction_loss(video, clips, options).item() == pytest.approx(expected.item(), rel=1e-6)
    brighter = reconstruction_loss(video + 0.25, clips, options)
    assert brighter.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_sum_with_motion_is_that_of_its_terms():
    clips, rows = torch.from_numpy(moving_squares(3)), torch.tensor([2, 0])
    torch.manual_seed(0)
    shape = (2, 4, *clips.shape[2:])
    head, background = torch.randn(shape).double(), torch.randn(2, 3, *shape[3:]).double()

    def loss(spec):
        options = tiny_options("modern", loss=spec)
        return glo_loss(head, background, Batch(clips, rows, rows), options, with_video=False)[0].item()

    parts = loss("laplacian:1,l2:2") + loss("motion:6")
    assert loss("laplacian:1,l2:2,motion:6") == pytest.approx(parts, rel=1e-6)
