"""efficientnet_lite0.py against a plain recomputation, and, where its weights are imported, on a photograph."""

from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_data import seeded_state, uniform

from vglann_fast.interop.weight_shapes import expected_shapes
from vglann_fast.nets.efficientnet_lite0 import EfficientNetLite0
from vglann_fast.nets.weights import load_weights, weights_folder
from vglann_fast.run.environment import default_cache

STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)


@pytest.fixture(scope="module")
def weights():
    return {
        key: torch.from_numpy(seeded_state.seeded_tensor(key, shape, 2**0.5))
        for key, shape in expected_shapes("lite0").items()
    }


def plain(w, x):
    """Block outputs and features in float64, for sides divisible by 32."""

    def conv(x, name, norm, stride=1):
        kernel = w[f"{name}.weight"]
        side = kernel.shape[-1] // 2
        before = side - (stride == 2)  # an even side: one row less than a centered kernel would want
        x = F.pad(x, (before, side, before, side))
        y = F.conv2d(x, kernel, stride=stride, groups=x.shape[1] // kernel.shape[1])
        mean, var, gain, shift = (
            w[f"{norm}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (var + 0.001).sqrt() * gain + shift

    w = {key: tensor.double() for key, tensor in w.items()}
    x = conv((x.double() - 127) / 128, "_conv_stem", "_bn0", 2).clamp(0, 6)
    outputs = []
    for number, stride in enumerate(STRIDES):
        name = f"_blocks.{number}"
        y = x
        if f"{name}._expand_conv.weight" in w:
            y = conv(y, f"{name}._expand_conv", f"{name}._bn0").clamp(0, 6)
        y = conv(y, f"{name}._depthwise_conv", f"{name}._bn1", stride).clamp(0, 6)
        y = conv(y, f"{name}._project_conv", f"{name}._bn2")
        x = x + y if y.shape == x.shape else y
        outputs.append(x)
    return outputs, conv(x, "_conv_head", "_bn1").clamp(0, 6).mean((2, 3))


def test_features_and_taps(weights):
    x = 255 * uniform("lite0.x", (1, 3, 32, 64))
    blocks, features = plain(weights, x)
    network = EfficientNetLite0.loaded(weights)
    torch.testing.assert_close(network(x).double(), features, rtol=1e-4, atol=1e-4)
    for found, block in zip(network(x, taps=(9, 2, 15)), (2, 9, 15), strict=True):
        torch.testing.assert_close(found.double(), blocks[block], rtol=1e-4, atol=1e-4)


def test_blocks_after_the_last_tap_are_not_run(weights):
    network = EfficientNetLite0.loaded(weights)
    network._blocks[5].register_forward_hook(lambda *_: pytest.fail("block 5 was run"))
    (tap,) = network(torch.zeros(1, 3, 32, 32), taps=[4])
    assert tap.shape == (1, 40, 4, 4)


def test_loading_leaves_the_random_state_and_freezes(weights):
    before = torch.get_rng_state()
    network = EfficientNetLite0.loaded(weights)
    assert torch.equal(torch.get_rng_state(), before)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    x = torch.full((1, 3, 32, 32), 100.0, requires_grad=True)
    network(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_it_knows_a_cockatoo():
    """ImageNet class 89, in a sharp frame of imageio's cockatoo.mp4."""
    file = default_cache() / "S" / "cockatoo.mp4"
    if not file.is_file() or not (weights_folder() / "lite0.json").is_file():
        pytest.skip("set S has not been fetched, or the weights of lite0 not imported")
    av = pytest.importorskip("av")
    with av.open(str(file)) as container:
        picture = next(islice(container.decode(video=0), 200, None)).to_ndarray(format="rgb24")
    rows, columns = picture.shape[:2]
    left = (columns - rows) // 2
    square = torch.from_numpy(np.ascontiguousarray(picture[:, left : left + rows])).permute(2, 0, 1)[None]
    network = EfficientNetLite0.loaded(load_weights("lite0").tensors)
    small = F.interpolate(square.float(), (224, 224), mode="area")
    assert network.classify(network(small)).argmax() == 89
