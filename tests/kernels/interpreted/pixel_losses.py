"""`l1_weight` and `l2_weight` of the two losses in the interpreter."""

import pytest
import torch
from counted import Traffic, poisoned
from vglann_kernels import composite_laplacian_loss, laplacian_pyramid_loss

WEIGHTS = [(0.7, 0.0), (0.0, 1.9), (0.7, 1.9), (-0.2, -0.3)]


def gradients(function, leaves):
    """(loss, gradients) of the kernel, and of the reference in float64."""
    results = []
    for impl, dtype in (("triton", leaves[0].dtype), ("reference", torch.float64)):
        copies = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        loss = function(*copies, impl=impl)
        loss.sum().backward()
        results.append([loss.detach(), *(leaf.grad for leaf in copies)])
    return zip(*results, strict=True)


def assert_close(pairs, tolerance=1e-6):
    for ours, exact in pairs:
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.float32])
def test_laplacian(weights, target_dtype):
    torch.manual_seed(1)
    video, target = torch.randn(2, 32, 32).tanh(), torch.randint(0, 256, (2, 32, 32), dtype=torch.uint8)
    options = {"l1_weight": weights[0], "l2_weight": weights[1], "reduction": "none"}
    if target_dtype == torch.float32:
        target = torch.randn(2, 32, 32)
        with poisoned():
            assert_close(
                gradients(
                    lambda x, y, impl: laplacian_pyramid_loss(x, y, impl=impl, **options), [video, target]
                )
            )
        return
    with poisoned():
        assert_close(
            gradients(lambda x, impl: laplacian_pyramid_loss(x, target, impl=impl, **options), [video])
        )


@pytest.mark.parametrize("last", [False, True])
def test_composite_laplacian(last):
    torch.manual_seed(2)
    head, background = torch.randn(2, 4, 3, 32, 32), torch.randn(2, 3, 32, 32)
    if last:
        head = head.to(memory_format=torch.channels_last_3d)
        background = background.to(memory_format=torch.channels_last)
    clips, index = torch.randint(0, 256, (4, 3, 3, 32, 32), dtype=torch.uint8), torch.tensor([3, 1])
    options = {"frames": 2, "mask_weight": 0.1, "l1_weight": 0.7, "l2_weight": 1.9}

    def loss(h, b, impl):
        return composite_laplacian_loss(h, b, clips, index, impl=impl, **options)

    with poisoned():
        assert_close(gradients(loss, [head, background]))


def test_without_a_pyramid_and_in_half_precision():
    torch.manual_seed(3)
    video, target = torch.randn(3, 32, 32).half(), torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    options = {"levels": 1, "level_weights": (0, 0), "l1_weight": 0.3, "l2_weight": 1.0}
    assert_close(
        gradients(lambda x, impl: laplacian_pyramid_loss(x, target, impl=impl, **options), [video]), 1e-3
    )


def test_a_bad_value_spoils_no_gradient_beside_it():
    torch.manual_seed(4)
    video, target = torch.randn(2, 32, 32), torch.randint(0, 256, (2, 32, 32), dtype=torch.uint8)
    video[1, 3, 4] = float("nan")
    options = {"levels": 1, "l1_weight": 0.3, "l2_weight": 1.0, "reduction": "none"}
    pairs = gradients(lambda x, impl: laplacian_pyramid_loss(x, target, impl=impl, **options), [video])
    for ours, exact in pairs:
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_one_launch_reads_the_planes_once():
    video, target = torch.randn(2, 64, 64), torch.randint(0, 256, (2, 64, 64), dtype=torch.uint8)
    moved = []
    for options in ({}, {"l1_weight": 0.3, "l2_weight": 1.0}):
        with Traffic() as traffic:
            laplacian_pyramid_loss(video.requires_grad_(), target, impl="triton", **options)
        moved.append(traffic.bytes)
    assert moved[0] == moved[1]
