"""metrics/features.py: each protocol against its definition, written out here, and independent of batching."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_data import golden, seeded_state

from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares
from vglann_fast.interop.weight_shapes import expected_shapes
from vglann_fast.metrics import features
from vglann_fast.metrics.features import extract, i3d_input, load_extractors, transnetv2_input
from vglann_fast.nets.efficientnet_lite0 import EfficientNetLite0
from vglann_fast.nets.transnetv2 import TransNetV2
from vglann_fast.nets.weights import Weights


@pytest.fixture(scope="module")
def weights():
    return {
        name: {
            key: torch.from_numpy(seeded_state.seeded_tensor(key, shape, 2**0.5))
            for key, shape in expected_shapes(name).items()
        }
        for name in ("lite0", "transnetv2")
    }


@pytest.fixture
def imported(weights, monkeypatch):
    """As if the seeded weights had been imported."""
    monkeypatch.setattr(features, "load_weights", lambda name: Weights(name, weights[name], f"sha of {name}"))


@pytest.fixture(scope="module")
def clips():
    return moving_squares(3, frames=4, size=32)


def features_by(name, clips):
    return extract(load_extractors([name]), clips)[name]


def test_i3d_sees_what_cd_fvd_shows_it():
    expected = golden("fvd_preprocess")
    clip = expected["video_uint8"][0].permute(3, 0, 1, 2)
    found = i3d_input(clip)
    assert found.shape == (1, 3, 2, 224, 224)
    torch.testing.assert_close(found[:, :, :1], expected["cdfvd_preprocess_i3d"], rtol=0, atol=2e-6)
    assert (found[:, :, :1] - expected["tf1_legacy_resize"]).abs().mean() > 0.01  # the other FVD's


def test_i3d_takes_nine_frames(imported, weights, clips):
    shapes = expected_shapes("i3d")
    weights["i3d"] = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    weights["i3d"]["logits.conv3d.bias"] = torch.arange(400.0)
    longer = clips[:1].repeat(3, axis=2)[:, :, :9]
    assert torch.equal(features_by("i3d", longer)[0], torch.arange(400.0).double())
    with pytest.raises(VglannError, match="at least 9 frames, these have 8"):
        features_by("i3d", longer[:, :, :8])


def test_transnetv2_sees_means_of_areas(clips):
    clip = np.repeat(
        np.repeat(clips[0, :, :1], 27, axis=2), 48, axis=3
    )  # so that every cell is 32 x 32 pixels
    found = transnetv2_input(torch.from_numpy(clip))
    cells = clip.reshape(3, 1, 27, 32, 48, 32).mean(axis=(3, 5))
    assert found.dtype == torch.uint8
    assert found.shape == (1, 3, 1, 27, 48)
    assert np.abs(found[0].numpy() - cells).max() <= 0.5 + 1e-3


def test_transnetv2(imported, weights, clips):
    network = TransNetV2.loaded(weights["transnetv2"])
    found = features_by("transnetv2", clips)
    assert found.shape == (3, 256)
    assert found.dtype == torch.float64
    with torch.inference_mode():
        stage = network.stages(transnetv2_input(torch.from_numpy(clips[1])))[2]
    torch.testing.assert_close(found[1], stage[0].double().mean((1, 2, 3)), rtol=1e-5, atol=1e-5)


def test_lite0(imported, weights, clips):
    network = EfficientNetLite0.loaded(weights["lite0"])
    frames = torch.from_numpy(clips[2]).transpose(0, 1).float()
    large = torch.nn.functional.interpolate(frames, size=features.LITE0_SIZE, mode="bilinear")
    with torch.inference_mode():
        each = network(large).double()
    torch.testing.assert_close(features_by("lite0", clips)[2], each.mean(0), rtol=1e-4, atol=1e-4)
    steps = (each[1:] - each[:-1]).abs().sum(0) / 3
    torch.testing.assert_close(features_by("lite0-step", clips)[2], steps, rtol=1e-3, atol=1e-4)


def test_a_network_of_two_protocols_runs_once(imported, clips):
    extractors = load_extractors(["lite0-step", "lite0"])
    (network,) = {one.network for one in extractors.values()}
    seen = []

    def counted(clip):
        seen.append(clip)
        return network(clip)

    together = extract({name: replace(one, network=counted) for name, one in extractors.items()}, clips)
    assert len(seen) == len(clips)
    for name, rows in together.items():
        assert torch.equal(rows, features_by(name, clips))


@pytest.mark.parametrize("name", ["lite0", "lite0-step", "transnetv2"])
def test_features_do_not_depend_on_the_batching(imported, clips, name):
    extractors = load_extractors([name])

    def take(some):
        return extract(extractors, some)[name]

    together = take(clips)
    assert torch.equal(together, torch.cat([take(clips[:1]), take(torch.from_numpy(clips[1:]))]))
    assert torch.equal(together.flip(0), take(clips[::-1].copy()))
    assert take(clips[:0]).shape == (0, extractors[name].dimensions)
    assert together.std(0).max() > 0


def test_a_still_clip_has_no_steps(imported, clips):
    still = np.repeat(clips[:, :, :1], 3, axis=2)
    assert features_by("lite0-step", still).max() < 1e-4


def test_the_record_says_all(imported):
    for name, network in (("lite0", "lite0"), ("lite0-step", "lite0"), ("transnetv2", "transnetv2")):
        take = load_extractors([name])[name]
        assert json.loads(json.dumps(take.protocol)) == take.protocol
        assert take.protocol["sha256"] == f"sha of {network}"
        assert take.protocol["name"] == name
        assert take.protocol["dimensions"] == take.dimensions
        assert {"network", "layer", "resize", "size", "range", "color", "frames"} <= take.protocol.keys()


def test_clips_that_are_not(imported, clips):
    for wrong in (clips[0], clips.astype(np.float32), clips[:, :2]):
        with pytest.raises(VglannError, match="takes uint8 clips"):
            features_by("lite0", wrong)
    with pytest.raises(VglannError, match="at least 2 frames, these have 1"):
        features_by("lite0-step", clips[:, :, :1])


def test_names_and_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("VGLANN_WEIGHTS", str(tmp_path))
    with pytest.raises(VglannError, match="no features 'vgg'; there are i3d"):
        load_extractors(["vgg"])
    with pytest.raises(VglannError, match="weights import lite0 FILE"):
        load_extractors(["lite0-step"])
