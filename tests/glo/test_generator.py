"""The generator: conformance with the author's networks in float64, and what the liberties must not change."""

import pytest
import torch
from golden_data import author_generator_state, golden, normal, normal64, relative_l2
from torch import nn

from vglann_fast.errors import VglannError
from vglann_fast.glo.batchnorm import batch_norms, recompute_batchnorm
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.interop.glann_video import load_generator

LONG = {"orig": "original", "expanded": "expanded"}
NETS = [(variant, mode) for variant in LONG for mode in ("eval", "train")]


@pytest.fixture(scope="module", params=NETS, ids=["-".join(net) for net in NETS])
def passed(request):
    """One float64 forward and backward of an author's network, beside its recorded numbers."""
    variant, mode = request.param
    expected = golden(f"gen_{variant}_{mode}_b2_parts")
    generator = load_generator(author_generator_state(variant), LONG[variant]).train(mode == "train")
    z = expected["z"].double().requires_grad_()
    video = generator(z)
    loss = (video * normal("gen.w.b2", tuple(video.shape)).double()).sum()
    loss.backward()
    return variant, mode, generator, z, video, loss, expected


def test_output_matches_the_author(passed):
    variant, mode, _, _, video, loss, expected = passed
    digest = golden("digest")
    name = f"{variant}.{mode}.b2"
    sums = video.detach().sum((1, 3, 4))
    assert torch.allclose(sums, digest[f"{name}.out_sum_per_frame"], rtol=1e-6, atol=1e-6)
    strided = digest[f"{name}.out_strided"].double()
    steps = [video.shape[i] // strided.shape[i] for i in (2, 3, 4)]
    assert relative_l2(video.detach()[:, :, :: steps[0], :: steps[1], :: steps[2]], strided) < 1e-6
    assert abs(loss.item() / expected["loss"].item() - 1) < 1e-6


def test_streams_match_the_author(passed):
    _, mode, generator, z, _, _, expected = passed
    if mode == "train":  # a second forward in train mode has the same batch statistics
        buffers = {name: value.clone() for name, value in generator.named_buffers()}
    with torch.no_grad():
        _, mask, background = generator.streams(z)
    if mode == "train":
        generator.load_state_dict(buffers, strict=False)
    assert relative_l2(mask, expected["mask"]) < 1e-6
    assert relative_l2(background, expected["background"]) < 1e-6


def test_gradients_match_the_author(passed):
    _, _, generator, z, _, _, expected = passed
    assert relative_l2(z.grad, expected["grad.z"]) < 1e-6
    head = generator.video.head
    for ours, theirs in (
        (head.weight.grad[:, :3], "foreground.0.weight"),
        (head.weight.grad[:, 3:], "mask.0.weight"),
        (head.bias.grad[:3], "foreground.0.bias"),
        (generator.video.norm3.weight.grad, "video.batch_norm3.weight"),
        (generator.background.norm4.bias.grad, "background.bn_conv5_background.bias"),
    ):
        assert relative_l2(ours, expected[f"grad.{theirs}"]) < 1e-6, theirs
    probe = expected["gradprobe.video.conv3.weight"]
    grad = generator.video.conv3.weight.grad
    noise = torch.from_numpy(normal64("gradprobe.video.conv3.weight", tuple(grad.shape)))
    found = torch.stack([grad.sum(), grad.norm(), (grad * noise).sum()])
    assert torch.allclose(found, probe, rtol=1e-6, atol=1e-6 * probe[1].item())


def test_running_statistics_match_the_author(passed):
    variant, mode, generator, _, _, _, expected = passed
    if mode == "eval":
        before = load_generator(author_generator_state(variant), LONG[variant])
        for now, then in zip(batch_norms(generator), batch_norms(before), strict=True):
            assert torch.equal(now.running_mean, then.running_mean)
        return
    theirs = author_generator_state(variant)
    bias = theirs["video.conv3.bias"]  # folded into the running mean
    norm = generator.video.norm3
    assert relative_l2(norm.running_mean + bias, expected["after.video.batch_norm3.running_mean"]) < 1e-6
    assert relative_l2(norm.running_var, expected["after.video.batch_norm3.running_var"]) < 1e-6
    uses = expected["after.video.batch_norm2.num_batches_tracked"].item()
    assert generator.video.norm2.num_batches_tracked.item() == uses == (2 if variant == "expanded" else 1)


def test_float32_stays_within_three_times_the_recorded_deviation():
    expected = golden("gen_orig_eval_b2_parts")
    state = {
        key: value.float() if value.is_floating_point() else value
        for key, value in author_generator_state("orig").items()
    }
    generator = load_generator(state).eval()
    with torch.no_grad():
        _, mask, _ = generator.streams(expected["z"])
    assert (mask - expected["mask"]).abs().max() < 3 * 4.9e-7


def test_import_names_what_does_not_fit():
    state = author_generator_state("orig")
    del state["video.conv2.weight"]
    with pytest.raises(VglannError, match=r"1 keys missing.*video\.conv2\.weight"):
        load_generator(state)
    with pytest.raises(VglannError, match="is the variant right"):
        load_generator(author_generator_state("orig"), "expanded")


@pytest.mark.parametrize(("frames", "size"), [(16, 32), (32, 32), (16, 48)])
def test_other_sizes(frames, size):
    torch.manual_seed(0)
    generator = TwoStreamGenerator(width=2, latent_dim=5, frames=frames, size=size)
    z = torch.randn(3, 5)
    video = generator(z)
    foreground, mask, background = generator.streams(z)
    assert video.shape == (3, 3, frames, size, size)
    mixed = mask * foreground + (1 - mask) * background.unsqueeze(2)
    assert torch.allclose(video, mixed, atol=1e-6)
    # The background stream does not see time, so with the mask shut the video stands still.
    generator.video.head.bias.data[3] = -100.0
    still = generator(z)
    assert torch.equal(still[:, :, 0], still[:, :, -1])


@pytest.mark.parametrize("variant", ["original", "expanded"])
def test_channels_last_changes_nothing_but_the_layout(variant):
    torch.manual_seed(0)
    generator = TwoStreamGenerator(variant, width=4, latent_dim=8, frames=16, size=32).double()
    z = torch.randn(2, 8, dtype=torch.float64)
    plain = generator(z)
    last = generator.channels_last()(z)
    assert generator.video.conv3.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.allclose(plain, last, atol=1e-12)


def test_published_sizes_and_initial_spread():
    torch.manual_seed(0)
    generator = TwoStreamGenerator()
    # 16,245,383 in the paper's network, less the biases in front of its eight BatchNorms.
    assert sum(p.numel() for p in generator.parameters()) == 16_245_383 - 2 * (512 + 256 + 128 + 64)
    grid = 32 * 512
    assert generator.stem.weight[:grid].std().item() == pytest.approx((2 * 2 / (612 * 32)) ** 0.5, rel=0.02)
    assert generator.video.conv3.weight.std().item() == pytest.approx((2 * 2 / (384 * 64)) ** 0.5, rel=0.02)
    assert generator.video.head.weight[:, :3].std().item() == pytest.approx(
        (2 * 2 / (67 * 64)) ** 0.5, rel=0.03
    )


def test_projected_gradient_is_tangent_and_detached_is_not():
    torch.manual_seed(0)
    for latent_norm, tangent in (("projected", True), ("detached", False)):
        generator = TwoStreamGenerator(
            width=2, latent_dim=6, frames=16, size=16, latent_norm=latent_norm
        ).double()
        z = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        (generator(z) * torch.randn(4, 3, 16, 16, 16)).sum().backward()
        radial = ((z.grad * z).sum(1).abs() / (z.grad.norm(dim=1) * z.norm(dim=1))).max().item()
        assert (radial < 1e-12) is tangent


def test_recompute_batchnorm_averages_over_the_batches_and_keeps_the_mode():
    torch.manual_seed(0)
    generator = TwoStreamGenerator(width=4, latent_dim=6, frames=16, size=32).double().eval()
    z = torch.randn(80, 6, dtype=torch.float64)
    recompute_batchnorm(generator, [z[:40], z[40:]])
    assert not generator.training
    assert all(norm.momentum == 0.1 for norm in batch_norms(generator))
    first = (z / z.norm(dim=1, keepdim=True)) @ generator.stem.weight.T
    means = first.mean(0).unflatten(0, (-1, generator.channels))
    assert torch.allclose(generator.video.norm1.running_mean, means[: generator.video_positions].mean(0))
    # Over the same 80 latents at once: train mode except for the unbiased variance and the split in two.
    assert (generator(z) - generator.train()(z)).abs().mean() < 0.01
    with pytest.raises(ValueError, match="at least one batch"):
        recompute_batchnorm(generator, [])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"variant": "huge"}, "variant"),
        ({"frames": 20}, "frames"),
        ({"size": 0}, "size"),
        ({"latent_norm": "x"}, "norm"),
    ],
)
def test_bad_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        TwoStreamGenerator(**wrong)


def test_no_bias_in_front_of_a_batchnorm():
    for module in TwoStreamGenerator("expanded", width=2).modules():
        if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d) and module.out_channels > 4:
            assert module.bias is None
