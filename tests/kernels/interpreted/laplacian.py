"""The kernel of `laplacian_pyramid_loss` in the interpreter."""

import pytest
import torch
from counted import Traffic, poisoned
from vglann_kernels import laplacian_pyramid_loss, verify

OP = torch.ops.vglann_kernels.laplacian_pyramid.default


def videos(shape=(1, 3, 2, 32, 32), dtype=torch.float32):
    torch.manual_seed(0)
    video = torch.randn(shape).tanh().to(dtype).requires_grad_()
    return video, torch.randint(0, 256, shape, dtype=torch.uint8)


def both(video, target, upstream=lambda loss: loss.sum(), **options):
    """(loss, gradient by video) of the kernel, and of the reference in float64."""
    results = []
    for impl, dtype in (("triton", video.dtype), ("reference", torch.float64)):
        x = video.detach().to(dtype).requires_grad_()
        loss = laplacian_pyramid_loss(x, target, impl=impl, **options)
        upstream(loss).backward()
        results.append((loss.detach(), x.grad))
    return results


def assert_close(ours, exact, tolerance=1e-6):
    """Loss by value; the gradient as a vector: relative L2, cosine, and no row wrongly zero."""
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=tolerance, atol=1e-9)
    a, b = ours[1].double(), exact[1]
    assert (a - b).norm() <= tolerance * b.norm() + 1e-12
    assert torch.equal(a.abs().sum(dim=-1) == 0, b.abs().sum(dim=-1) == 0)


def test_against_float64():
    """The default blur; `make proof` compares all of them."""
    for line in verify.laplacian(verify.Shapes(batch=1, frames=1, size=32, device="cpu")):
        assert line.ok, str(line)


@pytest.mark.parametrize(
    ("size", "levels", "blur"),
    # Each size and count with one blur, and both blurs of two terms (paper) and of one (the others) at both sizes:
    # where the levels lie does not depend on the blur, and all blurs meet all counts at size 32 below.
    [(64, 3, "gaussian"), (64, 5, "binomial"), (64, 5, "paper"), (128, 4, "gaussian"), (128, 4, "paper")],
)
def test_larger_planes(size, levels, blur):
    """Levels whose values each have a thread, and levels of fewer values than threads."""
    with poisoned():
        assert_close(*both(*videos((2, size, size)), levels=levels, blur=blur))


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("blur", ["binomial", "gaussian", "paper"])
def test_levels_and_blurs(levels, blur):
    assert_close(*both(*videos((2, 32, 32)), levels=levels, blur=blur, sigma=1.2))


@pytest.mark.parametrize("sigma", [0.05, 0.5, 100.0])
@pytest.mark.parametrize("blur", ["gaussian", "paper"])
def test_narrow_and_wide_blurs(sigma, blur):
    assert_close(*both(*videos((2, 32, 32)), blur=blur, sigma=sigma))


@pytest.mark.parametrize("size", [1e-15, 1e6])
def test_differences_of_any_size(size):
    torch.manual_seed(2)
    video, target = (size * torch.randn(2, 32, 32) for _ in range(2))
    for blur in ("binomial", "paper"):
        ours, exact = both(video, target, blur=blur, levels=5, reduction="none")
        assert_close(ours, exact)


def test_weights_reductions_and_ranges():
    video, target = videos()
    assert_close(*both(video, target, level_weights=(0.3, 0, 2, 5), reduction="none"))
    assert_close(*both(video, target, level_weights=(0, 0, 0, -1), reduction="sum", target_range=(0, 1)))
    torch.manual_seed(1)
    each = torch.randn(1, 3, 2)
    assert_close(*both(video, target, lambda loss: (loss * each.to(loss)).sum(), reduction="none"))


def test_upstream_gradients_that_are_not_one():
    video, target = videos((2, 32, 32))
    assert_close(*both(video, target, lambda loss: -2.5 * loss))
    assert_close(*both(video, target, lambda loss: loss[1:].expand(3).sum(), reduction="none"))
    half, target = videos((2, 32, 32), torch.float16)
    assert_close(*both(half, target, lambda loss: 4096 * loss), tolerance=5e-4)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last_3d),
        lambda x: x[:, :, 1:],
        lambda x: x.transpose(3, 4),
        lambda x: x.permute(2, 0, 1, 3, 4)[None],
        lambda x: x[0, 0, 0],
        lambda x: x[:, :1].expand(-1, 3, -1, -1, -1),
    ],
)
def test_any_strides(view):
    video, target = videos()
    losses = []
    for impl in ("triton", "reference"):
        x = video.detach().double() if impl == "reference" else video.detach()
        x.requires_grad_()
        laplacian_pyramid_loss(view(x), view(target), impl=impl).backward()
        losses.append(x.grad.double())
    assert (losses[0] - losses[1]).norm() <= 1e-6 * losses[1].norm()


def test_gradients_of_a_floating_target():
    video, _ = videos((2, 32, 32))
    target = torch.rand(2, 32, 32).half().requires_grad_()
    laplacian_pyramid_loss(video, target, impl="triton").backward()
    torch.testing.assert_close(target.grad, -video.grad.half())


def test_equal_videos_have_no_gradient():
    video, _ = videos((2, 32, 32))
    loss = laplacian_pyramid_loss(video, video.detach(), impl="triton")
    loss.backward()
    assert loss == 0
    assert not video.grad.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate_as_in_the_reference(bad):
    video, target = videos((2, 32, 32))
    with torch.no_grad():
        video[1, 3, 4] = bad
    ours, exact = both(video, target, reduction="none")
    assert ours[0].isnan().tolist() == exact[0].isnan().tolist() == [False, True]
    if bad != bad:  # an infinity less an infinity: which values are NaN depends on the order of sums
        torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-5, atol=1e-9)
    assert ours[1].isfinite().all()


def test_nothing_is_left_unwritten():
    with poisoned():
        assert_close(*both(*videos((3, 32, 32)), reduction="none"))


def test_no_gradient_is_made_unasked():
    video, target = videos((2, 32, 32))
    with torch.no_grad(), Traffic() as without:
        laplacian_pyramid_loss(video, target, impl="triton")
    with Traffic() as asked:
        laplacian_pyramid_loss(video, target, impl="triton")
    assert asked.unique - without.unique >= 4 * video.numel()


def test_the_gradient_is_handed_out_once():
    video, target = videos((1, 32, 32))
    loss = laplacian_pyramid_loss(video, target, impl="triton")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="hands it out once"):
        loss.backward()
    loss = laplacian_pyramid_loss(video, target, impl="triton")
    (grad,) = torch.autograd.grad(loss, video, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_empty_batches():
    video, target = videos((0, 3, 32, 32))
    loss = laplacian_pyramid_loss(video, target, impl="triton", reduction="sum")
    loss.backward()
    assert loss == 0
    assert video.grad.shape == video.shape


def test_what_the_kernel_does_not_take_is_refused_by_name():
    for shape in ((2, 32, 64), (2, 48, 48), (2, 16, 16)):
        with pytest.raises(ValueError, match=f"square planes of 32, 64, 128, got {shape[1]}x{shape[2]}"):
            laplacian_pyramid_loss(*videos(shape), impl="triton")
    with pytest.raises(ValueError, match="got float64"):
        laplacian_pyramid_loss(*videos((2, 32, 32), torch.float64), impl="triton")


def test_autocast_changes_nothing():
    video, target = videos((2, 32, 32))
    plain = laplacian_pyramid_loss(video, target, impl="triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert laplacian_pyramid_loss(video, target, impl="triton") == plain


def test_opcheck():
    video, target = videos((1, 2, 1, 32, 32))
    video = video.detach()
    last = video.to(memory_format=torch.channels_last_3d)
    rest = (2, "binomial", 2.0, [1.0] * 3, [-1.0, 1.0])
    torch.library.opcheck(OP, (video, target, *rest, "mean", 0.0, 0.0, True))
    torch.library.opcheck(OP, (last, target, *rest, "none", 0.5, 2.0, True))
    torch.library.opcheck(OP, (video, target, *rest, "sum", 0.0, 0.0, False))
    scaling = torch.ops.vglann_kernels.scale_gradients.default
    torch.library.opcheck(scaling, ([torch.randn(3, 4), torch.randn(5, 6)], torch.tensor(2.0), 1.5))


def test_traces_into_one_graph():
    video, target = videos((2, 32, 32))
    function = lambda x: 3 * laplacian_pyramid_loss(1.5 * x, target, impl="triton")  # noqa: E731
    torch.compile(function, fullgraph=True, backend="aot_eager")(video).backward()
    traced, video.grad = video.grad, None
    function(video).backward()
    torch.testing.assert_close(traced, video.grad)


def test_plane_offsets_are_64_bit():
    """Planes 4 GB apart: a 32-bit offset would wrap around. The memory in between is never touched."""
    size, far = 32, 3 * 2**30
    store = torch.empty(far + 2 * size * size, dtype=torch.uint8)  # reserved, not written
    target = store.as_strided((2, size, size), (far, size, 1))
    torch.manual_seed(0)
    target.copy_(torch.randint(0, 256, target.shape, dtype=torch.uint8))
    video = torch.zeros(2, size, size)
    ours = laplacian_pyramid_loss(video, target, impl="triton", reduction="none")
    torch.testing.assert_close(ours, laplacian_pyramid_loss(video, target.clone(), reduction="none"))


def test_rows_out_of_reach_of_32_bits_are_copied():
    """Rows 70 MB apart: the last of 32 rows lies more than 2^31 values behind the first."""
    size, far = 32, 70_000_000
    store = torch.empty((size - 1) * far + size, dtype=torch.uint8)  # reserved, only the rows are written
    target = store.as_strided((1, size, size), (far, far, 1))
    torch.manual_seed(0)
    target.copy_(torch.randint(0, 256, target.shape, dtype=torch.uint8))
    video = torch.zeros(1, size, size)
    ours = laplacian_pyramid_loss(video, target, impl="triton")
    torch.testing.assert_close(ours, laplacian_pyramid_loss(video, target.clone()))


def test_traffic():
    """Bytes over the floor: video and target once in, gradient once out; an upstream of 1 moves nothing."""
    video, target = videos((2, 64, 64), torch.float16)
    floor = video.numel() * (2 + 1 + 2)
    with Traffic() as forward:
        laplacian_pyramid_loss(video, target, impl="triton")
    # Nothing is read twice.
    assert floor <= forward.unique <= forward.bytes <= 1.01 * floor
    video, target = videos((2, 64, 64))
    loss = laplacian_pyramid_loss(video, target, impl="triton")
    with Traffic() as backward:
        loss.backward()
    assert backward.unique <= 8
