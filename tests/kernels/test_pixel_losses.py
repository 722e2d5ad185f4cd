"""`l1_weight` and `l2_weight`: plain differences beside the pyramid, by the PyTorch reference."""

import pytest
import torch
from vglann_kernels import composite_laplacian_loss, laplacian_pyramid_loss, mask_composite

L1, L2 = 0.7, 1.9


def planes(shape=(2, 3, 9, 12)):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_plain_differences_are_added_to_the_pyramid(reduction):
    x, y = planes()
    difference = x - y
    added = L1 * difference.abs().mean(dim=(2, 3)) + L2 * difference.square().mean(dim=(2, 3))
    if reduction != "none":
        added = getattr(added, reduction)()
    loss = laplacian_pyramid_loss(x, y, l1_weight=L1, l2_weight=L2, reduction=reduction)
    torch.testing.assert_close(loss, laplacian_pyramid_loss(x, y, reduction=reduction) + added)


def test_without_a_pyramid_it_is_the_plain_loss():
    x, y = planes()
    nothing = {"levels": 1, "level_weights": (0, 0)}
    torch.testing.assert_close(laplacian_pyramid_loss(x, y, l1_weight=1, **nothing), (x - y).abs().mean())
    torch.testing.assert_close(laplacian_pyramid_loss(x, y, l2_weight=1, **nothing), (x - y).square().mean())


def test_gradcheck():
    x, y = (image.requires_grad_() for image in planes((1, 4, 5)))
    options = {"levels": 1, "l1_weight": L1, "l2_weight": L2, "reduction": "none"}
    assert torch.autograd.gradcheck(lambda x, y: laplacian_pyramid_loss(x, y, **options), (x, y))


def test_bytes_are_mapped_first():
    x, _ = planes()
    target = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    mapped = target.double() / 255
    options = {"l1_weight": L1, "l2_weight": L2}
    loss = laplacian_pyramid_loss(x, target, target_range=(0, 1), **options)
    torch.testing.assert_close(loss, laplacian_pyramid_loss(x, mapped, **options))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_joined_op_scores_the_same_frames(reduction):
    torch.manual_seed(0)
    head, background = torch.randn(2, 4, 3, 8, 8).double(), torch.randn(2, 3, 8, 8).double()
    clips, index = torch.randint(0, 256, (4, 3, 3, 8, 8), dtype=torch.uint8), torch.tensor([3, 1])
    options = {"l1_weight": L1, "l2_weight": L2, "reduction": reduction}
    loss = composite_laplacian_loss(head, background, clips, index, frames=2, mask_weight=0.1, **options)
    video, mask_mean = mask_composite(head, background)
    expected = laplacian_pyramid_loss(video[:, :, :2], clips[index][:, :, :2], **options)
    torch.testing.assert_close(loss, expected + 0.1 * getattr(mask_mean, reduction)())


@pytest.mark.parametrize("name", ["l1_weight", "l2_weight"])
def test_a_bad_weight_is_named(name):
    with pytest.raises(ValueError, match=f"{name}: expected a finite number, got nan"):
        laplacian_pyramid_loss(*planes(), **{name: float("nan")})
