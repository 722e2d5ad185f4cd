"""Losses that `--loss` names, alone and in sums, and those by the features of a network."""

import os
from dataclasses import replace

import pytest
import torch
from feature_weights import import_lite0, random_weights
from four_clips import FourClips
from golden_data import author_generator_state, golden, network_state, normal, relative_l2, uniform
from tiny import new_run, tiny_options

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.pixels import to_range
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo import loader, perceptual
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.glo.compatibility import why_no_graph
from vglann_fast.glo.losses import glo_loss, reconstruction_loss
from vglann_fast.glo.perceptual import FeatureLoss, load_features
from vglann_fast.interop.glann_video import load_generator
from vglann_fast.nets.weights import Weights
from vglann_fast.options.presets import PRESETS
from vglann_fast.options.training import LOSSES, TrainOptions, loss_terms
from vglann_fast.run.folder import RunDir
from vglann_fast.samples.invert import invert

CPU = torch.device("cpu")
OTHER_WEIGHTS = r"other weights of lite0 \(sha256 aaaaaaaaaaaa, now bbbbbbbbbbbb\)"


def as_his(tensors, first):
    """Weights that give for our R, G, B what the author's weights give for B, G, R, as in the recordings."""
    return {**tensors, first: tensors[first].flip(1)}


@pytest.fixture
def imported(tmp_path, monkeypatch):
    monkeypatch.setenv("VGLANN_WEIGHTS", str(tmp_path / "weights"))
    import_lite0(tmp_path / "weights")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("data") / "clips", moving_squares(7))


@pytest.fixture(scope="module")
def real():
    return torch.from_numpy(moving_squares(2, frames=8, size=32))


def close_video(clips, options):
    """Videos near the clips, in the range of the training, that want a gradient."""
    noise = 0.2 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(1))
    return (to_range(clips, torch.float32, options.target_limits) + noise).requires_grad_()


def loss_by_batch(name, options):
    return perceptual.recipe_of(name, options).batch_statistics


def test_spec():
    assert loss_terms("vgg16") == {"vgg16": 1.0}
    assert loss_terms("laplacian:1, l1:0.1,resnext101-3d") == {
        "laplacian": 1.0,
        "l1": 0.1,
        "resnext101-3d": 1.0,
    }
    assert set(LOSSES) == {
        "laplacian",
        "l1",
        "l2",
        "motion",
        "vgg16",
        "hed-vgg16",
        "resnet50-3d",
        "resnext101-3d",
        "lite0",
    }


@pytest.mark.parametrize(
    "spec", ["", "vgg", "l1:", "l1:x", "l1:0", "l1:-1", "l1:inf", "l1:nan", "l1,l1:2", "l1,", "l1:1:2", "i3d"]
)
def test_bad_spec(spec):
    with pytest.raises(VglannError, match=r"^--loss: expected "):
        TrainOptions(loss=spec)


def test_a_sum_is_the_sum(real):
    def loss(spec, **changes):
        options = replace(PRESETS["modern"].train, loss=spec, levels=2, **changes)
        return reconstruction_loss(close_video(real, options), real, options).item()

    for changes in ({}, {"frame_reduction": "sum-but-last"}):
        one, other, third = loss("laplacian", **changes), loss("l1", **changes), loss("l2", **changes)
        expected = 0.5 * one + 2 * other + third
        assert loss("laplacian:0.5,l1:2,l2", **changes) == pytest.approx(expected, rel=1e-6)
    assert loss("l2") == pytest.approx(0.04, rel=0.05)
    assert loss("l2", frame_reduction="sum-but-last") == pytest.approx(7 * 0.04, rel=0.05)


@pytest.mark.parametrize("reduction", ["mean", "sum-but-last"])
def test_the_fused_loss_weighed_is_the_plain_one(real, reduction):
    options = replace(PRESETS["modern"].train, levels=2, mask_weight=0.3, frame_reduction=reduction)
    noise = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 4, 8, 32, 32, generator=noise), torch.randn(2, 3, 32, 32, generator=noise)
    batch = loader.Batch(real, torch.tensor([1, 0]), torch.tensor([0, 1]))
    summed = replace(options, loss="laplacian:2,l1:1e-9")
    fused = glo_loss(*logits, batch, replace(options, loss="laplacian:2"), with_video=False)[0]
    assert fused.item() == pytest.approx(
        glo_loss(*logits, batch, summed, with_video=False)[0].item(), rel=1e-5
    )


@pytest.mark.parametrize("perceptual_", ["fixed", "paper"])
@pytest.mark.parametrize("name", ["vgg16", "lite0", "hed-vgg16", "resnet50-3d", "resnext101-3d"])
def test_what_a_feature_loss_sees(name, perceptual_, real):
    options = replace(
        PRESETS["modern"].train, perceptual=perceptual_, frame_reduction="sum-but-last", loss=name
    )
    weights = random_weights(name)
    before = {key: tensor.clone() for key, tensor in weights.tensors.items()}
    # BatchNorm over the two values that such a small clip leaves of a channel tells rounding from nothing.
    dtype = torch.float64 if loss_by_batch(name, options) else torch.float32
    loss = FeatureLoss(weights, options, CPU, dtype=dtype)
    same = to_range(real, dtype, options.target_limits)
    distance = loss.against(real)
    assert distance(same).item() < 1e-3  # bytes or values: the same clip
    video = close_video(real, options)
    value = distance(video)
    assert value.item() == pytest.approx(loss.against(same)(video).item(), rel=1e-3)
    value.backward()
    moved = video.grad.abs().amax((0, 1, 3, 4)) > 0
    assert moved.tolist() == [True] * 7 + [name.endswith("-3d")]  # networks for videos see whole clips
    assert not any(parameter.requires_grad for parameter in loss.network.parameters())
    assert all(torch.equal(weights.tensors[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", ["lite0", "resnext101-3d"])
def test_networks_read_channels_last(name, real):
    loss = FeatureLoss(random_weights(name), PRESETS["modern"].train, CPU)
    form = torch.channels_last_3d if name.endswith("-3d") else torch.channels_last
    seen = []
    for module in loss.network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            module.register_forward_hook(lambda module, x, out: seen.append((x[0], out)))
    loss.levels(real)
    assert len(seen) > 5
    assert all(t.is_contiguous(memory_format=form) for pair in seen for t in pair if min(t.shape[2:]) > 1)


def test_input_statistics(real):
    """Black and white as the networks were trained on, whatever the range of the training."""
    for limits in ("symmetric", "unit"):
        options = replace(PRESETS["modern"].train, target_range=limits)
        loss = FeatureLoss(random_weights("vgg16"), options, CPU)
        seen = []
        loss.network.features[0].register_forward_hook(lambda module, x, out, seen=seen: seen.append(x[0]))
        low, high = options.target_limits
        for clip in (torch.full_like(real, 255), torch.full(real.shape, high), torch.full(real.shape, low)):
            loss.levels(clip)
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        for found, value in zip(seen, (1.0, 1.0, 0.0), strict=True):
            assert torch.allclose(found[0, :, 0, 0], (value - mean) / deviation, atol=1e-5)


@pytest.mark.parametrize("name", ["lite0", "resnext101-3d"])
def test_clip_by_clip_saves_memory_alone(name, real):
    options = PRESETS["modern"].train
    gradients, values = [], []
    for changes in ({}, {"checkpoint_activations": True}):
        loss = FeatureLoss(random_weights(name), replace(options, **changes), CPU)
        video = close_video(real, options)
        value = loss.against(real)(video)
        value.backward()
        values.append(value.item())
        gradients.append(video.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert relative_l2(gradients[1], gradients[0]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ["l1", "l2", "lite0", "l2:0.5,lite0"])
def test_half_precision_is_near(spec, dtype, real, imported):
    """Of the same logits: nothing of the loss but a network's arithmetic may be in half precision."""
    options = replace(PRESETS["modern"].train, loss=spec, mask_weight=0.0)
    noise = torch.Generator().manual_seed(3)
    head = torch.randn(2, 4, 8, 32, 32, generator=noise).to(dtype)
    background = torch.randn(2, 3, 32, 32, generator=noise).to(dtype)
    batch = loader.Batch(real, torch.arange(2), torch.arange(2))

    def loss(precision, *logits):
        features = load_features(options, CPU, precision=precision)
        value = glo_loss(*logits, batch, options, features, with_video=False)[0]
        assert value.dtype == torch.float32
        return value.item()

    exact = loss("fp32", head.float(), background.float())
    near = loss("fp32", head, background)
    assert near == pytest.approx(exact, rel=1e-4)
    if "lite0" in spec and dtype == torch.bfloat16:
        assert near != loss("bf16", head, background) == pytest.approx(exact, rel=0.005)


@pytest.mark.parametrize("spec", ["l1", "l2", "lite0"])
def test_a_half_precision_video_is_compared_in_float32(spec, real):
    """A target rounded to bf16 turns the signs of small differences around."""
    options = replace(PRESETS["modern"].train, loss=spec)
    half = close_video(real, options).detach().bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    if spec == "lite0":
        losses = [FeatureLoss(random_weights(spec), options, CPU).against(real)(v) for v in (half, full)]
    else:
        losses = [reconstruction_loss(v, real, options) for v in (half, full)]
    sum(losses).backward()
    assert torch.equal(*losses)
    assert torch.equal(half.grad, full.grad.bfloat16())


def steps_of(training, count):
    return torch.stack([training.train_step(with_video=False)[0] for _ in range(count)])


def test_weights_not_imported(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("VGLANN_WEIGHTS", str(tmp_path / "none"))
    options = tiny_options("modern", loss="l1,vgg16:0.1")
    with pytest.raises(VglannError, match=r"vgg16 .*vglann weights import vgg16 FILE"):
        new_training(ClipSet.open(clips, "train"), options, RunDir(tmp_path / "run", {}))


def test_resumed_with_the_same_weights_or_not_at_all(clips, tmp_path, imported):
    options = tiny_options("modern", loss="lite0")
    opened = ClipSet.open(clips, "train")
    whole = steps_of(new_training(opened, options, new_run(tmp_path / "whole", clips, options)), 5)
    run = new_run(tmp_path / "run", clips, options)
    first = new_training(opened, options, run)
    steps_of(first, 3)
    first.save()
    again = new_training(opened, options, run)
    again.restore()
    assert torch.equal(steps_of(again, 2), whole[3:])
    import_lite0(tmp_path / "weights", sha="b" * 64)
    with pytest.raises(VglannError, match=OTHER_WEIGHTS):
        new_training(opened, options, run).restore()


def test_inversion_by_features(clips, tmp_path, imported):
    options = tiny_options("modern", loss="l2:0.1,lite0", batchnorm="train")
    run = new_run(tmp_path / "run", clips, options)
    training = new_training(ClipSet.open(clips, "train"), options, run)
    steps_of(training, 1)
    training.save()
    trained = load_trained(run)
    video = training.clips.read([0])
    found = invert(trained, video, starts=1, steps=3)
    plain = invert(replace(trained, options=replace(options, loss="l2")), video, starts=1, steps=3)
    assert found.psnr.isfinite().all()
    assert not torch.equal(found.latents, plain.latents)
    import_lite0(tmp_path / "weights", sha="b" * 64)
    with pytest.raises(VglannError, match=OTHER_WEIGHTS):
        invert(trained, video, starts=1, steps=1)
    unrecorded = invert(replace(trained, weights={}), video, starts=1, steps=3)  # as of an older run
    assert torch.equal(unrecorded.latents, found.latents)


def test_no_graph_with_a_network():
    options = replace(PRESETS["modern"].train, loss="l1,lite0")
    reason = why_no_graph(options, torch.device("cuda"), processes=1, source="resident", precision="bf16")
    assert reason == "it was not tested with --loss l1,lite0"
    assert load_features(replace(options, loss="l1"), CPU) == {}


def test_the_authors_vgg_loss_of_a_video():
    tensors = as_his(network_state("vgg16_features", gain=2**0.5), "features.0.weight")
    loss = FeatureLoss(Weights("vgg16", tensors, ""), replace(PRESETS["paper"].train, loss="vgg16"), CPU)
    made, real = (
        2 * uniform("vgg.vid.fake", (1, 3, 32, 64, 64)) - 1,
        uniform("vgg.vid.real", (1, 3, 32, 64, 64)),
    )
    with torch.no_grad():
        found = loss.against(real)(made).item()
    assert found == pytest.approx(golden("vgg_video_loss")["loss_31_frames"].item(), rel=1e-6)


@pytest.mark.parametrize("name", ["resnet50-3d", "resnext101-3d"])
def test_the_authors_loss_by_videos(name):
    short = name.removesuffix("-3d")
    weights = Weights(name, as_his(network_state(f"r3d_{short}", gain=1.0), "conv1.weight"), "")
    loss = FeatureLoss(weights, replace(PRESETS["paper"].train, loss=name), CPU)
    made, real = 2 * uniform("r3d.v1", (2, 3, 32, 64, 64)) - 1, uniform("r3d.v2", (2, 3, 32, 64, 64))
    with torch.no_grad():
        found = loss.against(real)(made).item()
    expected = golden(f"r3d_{short}_train_distance")["loss"].mean().item()
    assert found == pytest.approx(expected, rel=1e-5)


LONG = pytest.mark.skipif(
    "VGLANN_LONG_TESTS" not in os.environ, reason="half a minute: set VGLANN_LONG_TESTS=1"
)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=LONG)])
def test_the_authors_training_with_vgg(dtype, tmp_path, monkeypatch):
    """The whole epoch in float64; float32 takes the first step, whose Adam is signs of gradients, some flipped."""
    expected = golden("glo_train_vgg")
    tensors = as_his(network_state("vgg16_features", gain=2**0.5), "features.0.weight")
    monkeypatch.setattr(perceptual, "load_weights", lambda name: Weights(name, tensors, ""))
    options = replace(PRESETS["paper"].train, loss="vgg16", batch_size=2, epochs=20, cache_features="off")
    training = new_training(FourClips(), options, RunDir(tmp_path / "run", {}), dtype=dtype)
    training.generator.load_state_dict(load_generator(author_generator_state("orig", gain=1.4)).state_dict())
    training.latents.rows.copy_(normal("glo.Z0", (4, 100), std=0.01))
    videos = uniform("glo.videos", (4, 32, 3, 64, 64)).to(dtype).transpose(1, 2)  # [N, C, T, H, W]
    training.begin_epoch(0)
    losses = []
    exact = dtype == torch.float64
    for rows in expected["ep0.perm"].split(2)[: None if exact else 1]:
        losses.append(training.update([loader.Batch(videos[rows], torch.arange(2), rows)], False)[0].double())
    tolerance = 1e-9 if exact else 1e-6
    assert torch.allclose(torch.stack(losses), expected["losses"][: len(losses)], rtol=tolerance, atol=0)
    if exact:
        training.latents.end_epoch()
        assert relative_l2(training.latents.rows, expected["ep0.Z"]) < 1e-6
