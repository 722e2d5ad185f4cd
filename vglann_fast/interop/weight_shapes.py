"""The content a weight file must have: keys and shapes of each public network, and the comparison with them."""

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor, nn

from vglann_fast.errors import VglannError
from vglann_fast.nets.efficientnet_lite0 import EfficientNetLite0
from vglann_fast.nets.i3d import I3D
from vglann_fast.nets.resnet3d import ResNet3d, Shortcut, shortcut_of
from vglann_fast.nets.transnetv2 import TransNetV2
from vglann_fast.nets.vgg16 import VGG16
from vglann_fast.nets.weights import Network

Shape = tuple[int, ...]

# network -> beginnings of keys that are left out
_IGNORED: dict[Network, tuple[str, ...]] = {
    "vgg16": ("classifier.",),
    "hed-vgg16": ("classifier.",),
    "resnet50-3d": ("fc.",),
    "resnext101-3d": ("fc.",),
}
_KINETICS = 400  # classes
_SHOWN = 3  # tensors named of each kind of difference


def checked(name: Network, found: Mapping[str, Tensor], called: str) -> dict[str, Tensor]:
    """The tensors of `found` that the network wants, as float32.

    Keys left out: `num_batches_tracked` everywhere; VGG16's classifier; the 3-D networks' classifier unless it is for
    the 400 classes of Kinetics.

    Raises `VglannError`, calling the file `called`, unless keys and shapes are the network's and all numbers are
    finite.
    """
    expected, theirs = _compared(name, found)
    differences = _differences(expected, theirs)
    if differences:
        others = [other for other in get_args(Network) if not _differences(*_compared(other, found))]
        hint = f"; it is a file of {others[0]}" if others else ""
        raise VglannError(f"{called}: not the weights of {name}: {', '.join(differences)}{hint}")
    tensors = {}
    for key, shape in expected.items():
        tensor = theirs[key]
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise VglannError(f"{called}: {key} is {tensor.dtype} {tensor.layout}, not floating and dense")
        tensors[key] = tensor.detach().float().reshape(shape).contiguous()
        if not torch.isfinite(tensors[key]).all():
            raise VglannError(f"{called}: {key} is not finite; the file is damaged, get it again")
    return tensors


def _compared(name: Network, found: Mapping[str, Tensor]) -> tuple[dict[str, Shape], dict[str, Tensor]]:
    """The shapes wanted, in view of which shortcuts and classifier there are, and the tensors to compare."""
    classifier = name.endswith("-3d") and "fc.bias" in found and found["fc.bias"].shape == (_KINETICS,)
    ignored = () if classifier else _IGNORED.get(name, ())
    theirs = {
        key: tensor
        for key, tensor in found.items()
        if not key.startswith(ignored) and not key.endswith(".num_batches_tracked")
    }
    return expected_shapes(name, shortcut_of(found), classifier), theirs


def _differences(expected: Mapping[str, Shape], found: Mapping[str, Tensor]) -> list[str]:
    """ "13 missing (a, b, c, ...)", "1 unknown (d)", "2 of another shape (e is 3x4, not 3x5; ...)"."""
    shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
    kinds = {
        "missing": [key for key in expected if key not in shapes],
        "unknown": [key for key in shapes if key not in expected],
        "of another shape": [
            f"{key} is {_text(shapes[key])}, not {_text(expected[key])}"
            for key in expected
            if key in shapes and shapes[key] != expected[key]
        ],
    }
    return [
        f"{len(named)} {kind} ({'; '.join(named[:_SHOWN])}{'; ...' if len(named) > _SHOWN else ''})"
        for kind, named in kinds.items()
        if named
    ]


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def expected_shapes(name: Network, shortcut: Shortcut = "B", classifier: bool = False) -> dict[str, Shape]:
    """Key -> shape of the tensors a network is stored as, in the order of its state dict.

    Of the 3-D networks: their shortcuts, and whether with the classifier of Kinetics.
    """
    with torch.device("meta"):
        network = _network(name, shortcut, classifier)
    return {
        key: tuple(tensor.shape)
        for key, tensor in network.state_dict().items()
        if not key.endswith(".num_batches_tracked")
    }


def _network(name: Network, shortcut: Shortcut, classifier: bool) -> nn.Module:
    if name in ("vgg16", "hed-vgg16"):
        return VGG16()
    if name in ("resnet50-3d", "resnext101-3d"):
        return ResNet3d(name, shortcut, until="fc" if classifier else "layer4", classes=_KINETICS)
    return {"i3d": I3D, "lite0": EfficientNetLite0, "transnetv2": TransNetV2}[name]()
