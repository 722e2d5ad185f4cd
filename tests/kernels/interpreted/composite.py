"""The kernels of `mask_composite` in the interpreter."""

import pytest
import torch
from counted import Traffic, poisoned
from vglann_kernels import mask_composite, verify

OP = torch.ops.vglann_kernels.mask_composite.default
OP_BACKWARD = torch.ops.vglann_kernels.mask_composite_backward.default


def logits(shape, dtype=torch.float32, last=False):
    batch, frames, height, width = shape
    torch.manual_seed(0)
    head = torch.randn(batch, 4, frames, height, width).to(dtype)
    background = torch.randn(batch, 3, height, width).to(dtype)
    if last:
        head = head.to(memory_format=torch.channels_last_3d)
        background = background.to(memory_format=torch.channels_last)
    return head.requires_grad_(), background.requires_grad_()


def both(head, background, upstream):
    """(values and gradients) of the kernel and of the reference in float64; `upstream(video)` makes a scalar."""
    results = []
    for impl, dtype in (("triton", head.dtype), ("reference", torch.float64)):
        h, b = (x.detach().to(dtype).requires_grad_() for x in (head, background))
        video, mean = mask_composite(h, b, impl=impl)
        upstream(video, mean).backward()
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (h, b)]
        results.append([video.detach(), mean.detach(), *grads])
    return zip(*results, strict=True)


@pytest.mark.parametrize("frames", [1, 5])
def test_against_float64(frames):
    for line in verify.composite(verify.Shapes(batch=2, frames=frames, size=8, device="cpu")):
        assert line.ok, str(line)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 7, 9), (1, 2, 33, 17), (65, 1, 4, 4), (3, 6, 24, 24)])
@pytest.mark.parametrize("last", [False, True])
def test_odd_shapes_leave_nothing_unwritten(shape, last):
    head, background = logits(shape, last=last)
    with poisoned():
        for ours, exact in both(head, background, lambda video, mean: video.square().sum() + mean.sum()):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "upstream",
    [
        lambda video, mean: (3 * video).sum(),  # expanded, not 1
        lambda video, mean: mean.sum(),
        lambda video, mean: video[:, :, 1:, ::2].sum(),  # sliced
        lambda video, mean: (video.permute(4, 0, 3, 1, 2) * torch.arange(6.0).to(video.dtype)).sum(),
        lambda video, mean: torch.cat([video, video * 2], dim=1).square().sum(),
        lambda video, mean: video.contiguous(memory_format=torch.channels_last_3d).pow(3).sum(),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_any_upstream_gradient(upstream, last):
    head, background = logits((2, 6, 6, 6), last=last)
    for ours, exact in both(head, background, upstream):
        assert (ours - exact).norm() <= 1e-6 * exact.norm()


def test_inputs_that_are_neither_layout():
    head, background = logits((2, 3, 8, 8))
    strided = head.detach().transpose(3, 4).contiguous().transpose(3, 4).requires_grad_()
    video = mask_composite(strided, background, impl="triton")[0]
    torch.testing.assert_close(video, mask_composite(head, background, impl="triton")[0])
    video.sum().backward()
    assert strided.grad.shape == head.shape


def test_the_video_is_contiguous_whatever_the_layout_of_the_head():
    for last in (False, True):
        head, background = logits((2, 3, 8, 8), last=last)
        video = mask_composite(head, background, impl="triton")[0]
        assert video.is_contiguous()


def test_nan_and_infinity_propagate_as_in_the_reference():
    head, background = logits((1, 2, 4, 4))
    with torch.no_grad():
        head[0, 0, 0, 0, 0], head[0, 3, 1, 1, 1] = float("nan"), float("inf")
        head[0, 1, 0, 2, 2], background[0, 2, 3, 3] = -float("inf"), float("nan")
    for ours, exact in both(head, background, lambda video, mean: video.sum()):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_an_empty_batch():
    head, background = logits((0, 2, 4, 4))
    video, mean = mask_composite(head, background, impl="triton")
    video.sum().backward()
    assert (video.shape, mean.shape, head.grad.shape) == ((0, 3, 2, 4, 4), (0,), (0, 4, 2, 4, 4))


def test_float64_is_refused_by_name():
    with pytest.raises(ValueError, match="head: expected a 16- or 32-bit float, got float64"):
        mask_composite(*logits((1, 1, 2, 2), torch.float64), impl="triton")


def test_a_second_derivative_is_refused():
    head, background = logits((1, 1, 4, 4))
    (grad,) = torch.autograd.grad(
        mask_composite(head, background, impl="triton")[0].sum(), head, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_opcheck():
    inputs = [x.detach() for x in logits((2, 3, 6, 6), last=True)]
    torch.library.opcheck(OP, inputs)
    upstream = torch.randn(2, 3, 3, 6, 6), torch.randn(2)
    for gradients in (upstream, (None, upstream[1]), (upstream[0], None)):
        torch.library.opcheck(OP_BACKWARD, (*inputs, *gradients))


def test_traces_into_one_graph():
    head, background = logits((2, 3, 6, 6))
    function = lambda h, b: mask_composite(h, b, impl="triton")[0].square().sum()  # noqa: E731
    torch.compile(function, fullgraph=True, backend="aot_eager")(head, background).backward()
    traced, head.grad = head.grad, None
    function(head, background).backward()
    torch.testing.assert_close(traced, head.grad)


@pytest.mark.parametrize("last", [False, True])
def test_traffic(last):
    """Bytes over the floor: each input and output once. 64 videos, so that frames are not split."""
    batch, frames, size = 64, 2, 4
    head, background = logits((batch, frames, size, size), torch.float16, last)
    area = size * size
    once = 2 * batch * area
    with Traffic() as forward:
        video, _ = mask_composite(head, background, impl="triton")
    floor = once * (4 * frames + 3 + 3 * frames)
    assert forward.bytes <= 1.05 * floor
    upstream = torch.randn_like(video)
    with Traffic() as backward:
        video.backward(upstream)
    assert backward.bytes <= 1.05 * once * (4 * frames + 3 + 3 * frames + 4 * frames + 3)
