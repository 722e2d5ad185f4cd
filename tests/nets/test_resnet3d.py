"""3-D ResNet-50 and ResNeXt-101 against their authors' networks and the loss the paper's author made of them."""

import pytest
import torch
import torch.nn.functional as F
from golden_data import golden, network_state, relative_l2, uniform

from vglann_fast.errors import VglannError
from vglann_fast.nets.resnet3d import TAPS, ResNet3d, shortcut_of

NAMES = ("resnet50-3d", "resnext101-3d")
# The author's lists of features: the last is named, but never looked at, by the ResNeXt.
COUNTED = {
    "resnet50-3d": ("pool", "layer1", "layer2", "layer4"),
    "resnext101-3d": ("pool", "layer1", "layer2"),
}
# Relative L2 in float32, three times what the recording itself deviates, by network and mode.
GRADIENT = {
    ("resnet50-3d", "eval"): 1e-2,
    ("resnet50-3d", "train"): 0.12,
    ("resnext101-3d", "eval"): 1e-2,
    ("resnext101-3d", "train"): 0.04,
}


@pytest.fixture(scope="module")
def states():
    return {name: network_state(f"r3d_{name.removesuffix('-3d')}", gain=1.0) for name in NAMES}


@pytest.fixture(scope="module")
def videos():
    """(generated, real), [2, 3, 32, 64, 64] each."""
    shape = (2, 3, 32, 64, 64)
    return 2 * uniform("r3d.v1", shape) - 1, uniform("r3d.v2", shape)


def strided(features, like):
    """Every few values of features [C, t, h, w], as the digest has them."""
    steps = [whole // kept for whole, kept in zip(features.shape, like.shape[1:], strict=True)]
    return features[:: steps[0], :: steps[1], :: steps[2], :: steps[3]]


@pytest.mark.parametrize("name", NAMES)
def test_features_and_logits(name, states, videos):
    network = ResNet3d.loaded(name, states[name])
    with torch.no_grad():
        features = dict(zip(TAPS, network(videos[0][:1], TAPS), strict=True))
        logits = network.classify(features["layer4"])
    whole, some, short = golden("k3d_logits_eval"), golden("digest"), name.removesuffix("-3d")
    assert relative_l2(features["layer3"], whole[f"{short}.layer3"]) < 3e-6
    assert relative_l2(features["layer4"], whole[f"{short}.layer4"]) < 3e-6
    assert relative_l2(logits, whole[f"{short}.logits"]) < 3e-6
    for tap, number in {"pool": 1, "layer1": 2, "layer2": 3}.items():
        expected = some[f"r3d.{short}.eval.f{number}_strided"]
        assert relative_l2(strided(features[tap][0], expected), expected[0]) < 3e-6, tap


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", NAMES)
def test_distance(name, mode, states, videos):
    """The made videos first, then the real ones, as he does: in train mode the running statistics remember.

    In eval mode a video does not depend on the others, so one of the two recorded is enough.
    """
    expected = golden(f"r3d_{name.removesuffix('-3d')}_{mode}_distance")
    taps = COUNTED[name]
    network = ResNet3d.loaded(name, states[name], until=taps[-1]).train(mode == "train")
    count = 2 if mode == "train" else 1
    made, real = videos[0][:count].clone().requires_grad_(), videos[1][:count]
    levels = [(made, real)]
    features = network(made, taps)
    with torch.no_grad():
        levels += zip(features, network(real, taps), strict=True)
    if name == "resnext101-3d":
        levels.append(levels[-1])  # the author's list names the last one twice
    loss = sum((a - b).abs().flatten(1).mean(1) for a, b in levels)
    (loss.sum() / 2).backward()
    assert torch.allclose(loss.double(), expected["loss"][:count], rtol=1e-5)
    found = made.grad[:, :, [0, 16, 31]]
    recorded = expected["grad.frames_0_16_31"][:count]
    recorded = recorded if recorded.shape == found.shape else recorded.transpose(1, 2)
    assert relative_l2(found, recorded) < GRADIENT[name, mode]
    for key in ("bn1", "layer2.0.bn2") if mode == "train" else ():
        norm = network.get_submodule(key)
        assert torch.allclose(norm.running_mean, expected[f"after.{key}.running_mean"], atol=1e-5)
        assert torch.allclose(norm.running_var, expected[f"after.{key}.running_var"], rtol=1e-4)
        assert norm.num_batches_tracked == expected[f"after.{key}.num_batches_tracked"] == 2


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_the_authors(name, states):
    with torch.device("meta"):
        found = {key: tensor.shape for key, tensor in ResNet3d(name).state_dict().items()}
    assert found == {key: tensor.shape for key, tensor in states[name].items()}


def test_no_deeper_than_asked(states):
    shallow = {
        k: v for k, v in states["resnext101-3d"].items() if not k.startswith(("layer3", "layer4", "fc"))
    }
    network = ResNet3d.loaded("resnext101-3d", shallow, until="layer2")
    # conv1, its norm and two stages, of 48 million
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(1.64e6, rel=0.01)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(VglannError, match=r"resnext101-3d: \d+ tensors differ, the first layer3\.0\.conv1"):
        ResNet3d.loaded("resnext101-3d", shallow, until="layer3")
    with pytest.raises(VglannError, match="not the weights of resnet50-3d"):
        ResNet3d.loaded("resnet50-3d", shallow, until="layer1")


def test_counters_may_be_missing_and_weights_stay_as_they_are(states):
    given = {k: v for k, v in states["resnet50-3d"].items() if "num_batches" not in k}
    before = given["bn1.running_mean"].clone()
    network = ResNet3d.loaded("resnet50-3d", given, until="pool").train()
    network(torch.randn(2, 3, 4, 16, 16), ("pool",))
    assert network.bn1.num_batches_tracked == 1
    assert torch.equal(given["bn1.running_mean"], before)


def test_shortcut_without_parameters(states):
    plain = {k: v for k, v in states["resnet50-3d"].items() if ".downsample." not in k}
    assert (shortcut_of(plain), shortcut_of(states["resnet50-3d"])) == ("A", "B")
    network = ResNet3d.loaded("resnet50-3d", plain, until="layer2")
    block = network.get_submodule("layer2")[0]
    torch.nn.init.zeros_(block.bn3.weight)
    torch.nn.init.zeros_(block.bn3.bias)
    x = torch.rand(1, 256, 4, 6, 6)
    expected = torch.cat([F.avg_pool3d(x, 1, 2), torch.zeros(1, 256, 2, 3, 3)], 1)
    assert torch.equal(block(x), expected)
