"""`composite_laplacian_loss` equals the two ops it joins; what it refuses."""

import pytest
import torch
from vglann_kernels import composite_laplacian_loss, laplacian_pyramid_loss, mask_composite


def inputs(batch=2, frames=3, size=8, dtype=torch.float64):
    torch.manual_seed(0)
    head = torch.randn(batch, 4, frames, size, size, dtype=dtype, requires_grad=True)
    background = torch.randn(batch, 3, size, size, dtype=dtype, requires_grad=True)
    clips = torch.randint(0, 256, (5, 3, frames, size, size), dtype=torch.uint8)
    return head, background, clips, torch.randint(0, 5, (batch,))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_is_the_two_ops_in_turn(reduction):
    head, background, clips, index = inputs()
    options = {"levels": 2, "blur": "paper", "target_range": (0.0, 1.0), "reduction": reduction}
    loss, video = composite_laplacian_loss(
        head, background, clips, index, frames=2, mask_weight=0.3, return_video=True, **options
    )
    mixed, mask_mean = mask_composite(head, background)
    expected = laplacian_pyramid_loss(mixed[:, :, :2], clips[index][:, :, :2], **options)
    expected = expected + 0.3 * getattr(mask_mean, reduction)()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(video, mixed.detach())
    assert not video.requires_grad
    ours = torch.autograd.grad(loss, (head, background))
    for mine, theirs in zip(ours, torch.autograd.grad(expected, (head, background)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_per_plane_values():
    head, background, clips, index = inputs()
    loss = composite_laplacian_loss(head, background, clips, index, reduction="none", frames=1)
    assert loss.shape == (2, 3, 1)
    mean = composite_laplacian_loss(head, background, clips, index, frames=1)
    torch.testing.assert_close(loss.mean(), mean)


def test_gradcheck():
    head, background, clips, index = inputs(1, 2, 4)
    function = lambda h, b: composite_laplacian_loss(h, b, clips, index, levels=1, mask_weight=0.2)  # noqa: E731
    assert torch.autograd.gradcheck(function, (head, background))


@pytest.mark.parametrize(
    ("place", "value", "options", "error", "message"),
    [
        (2, torch.zeros(5, 3, 3, 8, 8), {}, TypeError, "clips: expected uint8, got float32"),
        (2, torch.zeros(5, 3, 4, 8, 8).byte(), {}, ValueError, r"clips: expected shape \(N, 3, 3, 8, 8\)"),
        (3, torch.tensor([0, 5]), {}, ValueError, r"index: expected values in \[0, 5\)"),
        (3, torch.tensor([0]), {}, ValueError, r"index: expected shape \(2,\), got \(1,\)"),
        (0, None, {"frames": 0}, ValueError, "frames: expected an integer from 1 to 3, got 0"),
        (0, None, {"frames": 4}, ValueError, "frames: expected an integer from 1 to 3, got 4"),
        (0, None, {"levels": -2}, ValueError, "levels: expected an integer from 1 to 5, got -2"),
        (0, None, {"mask_weight": 0.1, "reduction": "none"}, ValueError, "mask_weight: expected 0"),
        (0, None, {"mask_weight": float("inf")}, ValueError, "mask_weight: expected a finite number"),
    ],
)
def test_bad_input_names_the_argument(place, value, options, error, message):
    arguments = list(inputs())
    if value is not None:
        arguments[place] = value
    with pytest.raises(error, match=message):
        composite_laplacian_loss(*arguments, **options)
