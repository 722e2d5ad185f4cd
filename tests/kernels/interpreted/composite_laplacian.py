"""The kernel of `composite_laplacian_loss` in the interpreter."""

import pytest
import torch
from counted import Traffic, poisoned
from vglann_kernels import composite_laplacian_loss, verify
from vglann_kernels.composite_laplacian import kernel

OP = torch.ops.vglann_kernels.composite_laplacian.default


def inputs(batch=2, frames=3, size=32, dtype=torch.float32, last=False):
    torch.manual_seed(0)
    head, background = torch.randn(batch, 4, frames, size, size), torch.randn(batch, 3, size, size)
    if last:
        head = head.to(memory_format=torch.channels_last_3d)
        background = background.to(memory_format=torch.channels_last)
    clips = torch.randint(0, 256, (5, 3, frames, size, size), dtype=torch.uint8)
    index = torch.randint(0, 5, (batch,))
    return head.to(dtype).requires_grad_(), background.to(dtype).requires_grad_(), clips, index


def check(head, background, clips, index, tolerance=1e-6, **options):
    """Loss, video and both gradients against the reference in float64; the upstream gradient is 2."""
    results = []
    for impl, dtype in (("triton", head.dtype), ("reference", torch.float64)):
        h, b = (x.detach().to(dtype).requires_grad_() for x in (head, background))
        loss, video = composite_laplacian_loss(h, b, clips, index, impl=impl, return_video=True, **options)
        (2 * loss).backward()
        results.append([loss.detach(), video, h.grad, b.grad])
    for ours, exact in zip(*results, strict=True):
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()


def test_against_float64():
    for line in verify.composite_laplacian(verify.Shapes(batch=2, frames=1, size=32, device="cpu")):
        assert line.ok, str(line)


@pytest.mark.parametrize("last", [False, True])
def test_several_frames_a_program_and_a_short_last_one(last, monkeypatch):
    monkeypatch.setattr(kernel, "frames_of_a_program", lambda *_: 2)
    with poisoned():
        check(*inputs(last=last), mask_weight=0.2)


@pytest.mark.parametrize(
    ("size", "levels", "blur", "dtype", "tolerance", "last"),
    [
        (32, 5, "gaussian", torch.float32, 1e-6, False),
        (32, 1, "binomial", torch.float32, 1e-6, True),
        (64, 4, "paper", torch.float16, 2e-3, False),
        (128, 2, "binomial", torch.float16, 2e-3, True),
    ],
)
def test_planes_levels_blurs_and_layouts(size, levels, blur, dtype, tolerance, last):
    with poisoned():
        check(
            *inputs(1, 1, size, dtype, last), tolerance, levels=levels, blur=blur, sigma=1.2, mask_weight=0.1
        )


def test_more_videos_than_programs_share_a_program_by_frames(monkeypatch):
    """An H200 has 132 processors: 15 videos of 32 frames take a program for each frame, 256 one for every four."""
    monkeypatch.setattr(kernel, "processors", lambda device: 132)
    frames = [kernel.frames_of_a_program(videos, 32, torch.device("cpu")) for videos in (1, 15, 32, 256)]
    assert frames == [1, 1, 2, 4]


def test_saturated_logits_and_targets_far_from_the_video():
    head, background, clips, index = inputs(1, 2)
    with torch.no_grad():
        for logits in (head, background):
            logits[logits > 1] = 300.0
            logits[logits < -1] = -300.0
    check(head, background, clips, index, mask_weight=0.1)
    check(head, background, clips, index, target_range=(-1e5, 1e5))


def test_frames_left_out_get_the_prior_only():
    head, background, clips, index = inputs(1)
    check(head, background, clips, index, frames=1, mask_weight=0.2, reduction="sum")
    composite_laplacian_loss(head, background, clips, index, frames=2, impl="triton").backward()
    assert not head.grad[:, :, 2:].any()
    assert head.grad[:, :, :2].any()


def test_the_papers_options_in_half_precision():
    options = {"blur": "paper", "target_range": (0.0, 1.0)}
    check(*inputs(1, 1, 64, torch.float16, last=True), tolerance=2e-3, **options)


def test_per_plane_values_without_gradient():
    head, background, clips, index = (x.detach() for x in inputs())
    ours = composite_laplacian_loss(head, background, clips, index, impl="triton", reduction="none")
    exact = composite_laplacian_loss(head, background, clips, index, impl="reference", reduction="none")
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="'none' has a value per plane and no gradient"):
        composite_laplacian_loss(
            head.requires_grad_(), background, clips, index, impl="triton", reduction="none"
        )


def test_a_bad_index_that_nobody_checked_costs_nan_and_no_wild_read():
    head, background, clips, _ = inputs(2, 1)
    bad = torch.tensor([1, 2**40])
    weights, span = [1.0] * 4, [-1.0, 1.0]
    losses = OP(
        head,
        background,
        clips,
        bad,
        1,
        0.0,
        3,
        "binomial",
        2.0,
        weights,
        span,
        "none",
        0.0,
        0.0,
        False,
        False,
    )[0]
    assert losses.isnan().any(dim=2).any(dim=1).tolist() == [False, True]


@pytest.mark.parametrize(("frames_each", "unique", "accesses"), [(4, 1.3, 3.9), (1, 1.9, 5.7)])
def test_the_video_never_reaches_memory(frames_each, unique, accesses, monkeypatch):
    """Bytes over the floor: with each address counted once, and with what a cache serves again."""
    monkeypatch.setattr(kernel, "frames_of_a_program", lambda *_: frames_each)
    head, background, clips, index = inputs(1, 4, 32, torch.float16, last=True)
    with Traffic() as moved:
        loss = composite_laplacian_loss(head, background, clips, index, impl="triton")
    floor = 2 * (2 * head.numel() + 2 * background.numel()) + clips[0].numel()
    assert moved.unique <= unique * floor
    assert moved.bytes <= accesses * floor
    with Traffic() as nothing:
        loss.backward()
    assert nothing.bytes > 0  # float16 is scaled late; other dtypes are done
    single = inputs(1, 1)
    loss = composite_laplacian_loss(*single, impl="triton")
    with Traffic() as nothing:
        loss.backward()
    assert nothing.unique <= 8


def test_opcheck_and_one_graph():
    head, background, clips, index = inputs(1, 2)
    rest = (1, 0.1, 2, "binomial", 2.0, [1.0] * 3, [-1.0, 1.0])
    torch.library.opcheck(
        OP, (head.detach(), background.detach(), clips, index, *rest, "mean", 0.5, 2.0, True, True)
    )
    function = lambda h, b: 2 * composite_laplacian_loss(h, b, clips, index, impl="triton")  # noqa: E731
    torch.compile(function, fullgraph=True, backend="aot_eager")(head, background).backward()
    traced, head.grad = head.grad, None
    function(head, background).backward()
    torch.testing.assert_close(traced, head.grad)


def test_two_runs_are_equal_bit_for_bit():
    grads = []
    for _ in range(2):
        head, background, clips, index = inputs(1, 2)
        composite_laplacian_loss(head, background, clips, index, impl="triton").backward()
        grads.append((head.grad, background.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
