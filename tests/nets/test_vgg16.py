"""VGG16 against the features and the loss of the paper's author, who read them from torchvision's network."""

import pytest
import torch
from golden_data import golden, network_state, relative_l2

from vglann_fast.errors import VglannError
from vglann_fast.nets.vgg16 import VGG16

# What the author's list of layers 2, 7, 12, 21 has, whose ReLUs write over what comes before them; and what it says.
RECORDED = {2: (3, 7), 3: (3, 8, 12), 4: (3, 8, 13, 21)}
AS_WRITTEN = {2: (2, 7), 3: (2, 7, 12), 4: (2, 7, 12, 21)}


@pytest.fixture(scope="module")
def tensors():
    return network_state("vgg16_features", gain=2**0.5)


@pytest.fixture(scope="module")
def network(tensors):
    return VGG16.loaded(tensors, depth=22).double()


def distance(network, one, other, taps):
    levels = zip((one, *network(one, taps)), (other, *network(other, taps)), strict=True)
    return sum((a - b).abs().flatten(1).mean(1) for a, b in levels)


@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize(("taps", "name"), [(RECORDED, ""), (AS_WRITTEN, "_if_relu_not_inplace")])
def test_distance(network, levels, taps, name):
    expected = golden("vgg_distance")
    with torch.no_grad():
        found = distance(network, expected["I1"].double(), expected["I2"].double(), taps[levels])
    assert torch.allclose(found, expected[f"loss_levels{levels}{name}"], rtol=1e-9)


def test_gradient(network):
    expected = golden("vgg_distance")
    one = expected["I1"].double().requires_grad_()
    distance(network, one, expected["I2"].double(), RECORDED[4]).mean().backward()
    assert relative_l2(one.grad, expected["grad.I1.levels4"]) < 2e-7


def test_keys_are_torchvisions(tensors):
    with torch.device("meta"):
        found = {name: tensor.shape for name, tensor in VGG16().state_dict().items()}
    assert found == {name: tensor.shape for name, tensor in tensors.items()}


def test_a_tap_is_not_written_over(network):
    picture = golden("vgg_distance")["I1"][:1].double()
    before, after = network(picture, (5, 6))
    assert before.min() < 0
    assert torch.equal(before.relu(), after)


def test_frozen_and_no_deeper_than_asked(tensors):
    network = VGG16.loaded({k: v for k, v in tensors.items() if int(k.split(".")[1]) < 9}, depth=9)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(VglannError, match=r"VGG16: 18 tensors differ, the first features\.10\.weight"):
        VGG16.loaded(network.state_dict(), depth=31)


def test_another_shape_is_refused(tensors):
    odd = tensors["features.0.weight"][:, :1]
    with pytest.raises(VglannError, match=r"1 tensors differ, the first features\.0\.weight"):
        VGG16.loaded({**tensors, "features.0.weight": odd}, depth=2)


def test_swapped_colors(tensors):
    picture = golden("vgg_distance")["I1"][:1]
    plain, swapped = (VGG16.loaded(tensors, depth=4, swap_colors=swap) for swap in (False, True))
    (expected,), (found,) = plain(picture.flip(1), (3,)), swapped(picture, (3,))
    assert torch.allclose(found, expected, atol=1e-5)
